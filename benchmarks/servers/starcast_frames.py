"""starcast on uvicorn with the protocol that takes ready-made frames."""

from .starcast import main

if __name__ == "__main__":
    main(ws="starcast.uvicorn:BroadcastProtocol")
