import os

from starcast import Publisher


def main():
    with Publisher(os.environ["STARCAST_URL"]) as publisher:
        publisher.publish("room", {"type": "report", "ready": True})


if __name__ == "__main__":
    main()
