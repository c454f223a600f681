"""socketify (uWebSockets), with its own publish to a topic."""

import sys

from socketify import App, AppListenOptions, CompressOptions

app = App()


def on_open(websocket):
    websocket.subscribe("chat")


def on_message(websocket, message, opcode):
    app.publish("chat", message, opcode, True)


app.ws(
    "/ws",
    {"open": on_open, "message": on_message, "compression": CompressOptions.SHARED_COMPRESSOR},
)
app.listen(AppListenOptions(port=int(sys.argv[1]), host="127.0.0.1"))

if __name__ == "__main__":
    app.run()
