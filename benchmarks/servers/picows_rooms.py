"""picows, its core API, with rooms, on uvloop."""

import sys
from collections import defaultdict

import uvloop
from picows import WSFrame, WSListener, WSMsgType, WSTransport, ws_create_server

rooms = defaultdict(set)


class Listener(WSListener):
    def __init__(self, room: bytes):
        self.room = rooms[room]

    def on_ws_connected(self, transport: WSTransport):
        self.room.add(transport)

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame):
        if frame.msg_type == WSMsgType.TEXT:
            message = frame.get_payload_as_bytes()
            for client in self.room:
                client.send(WSMsgType.TEXT, message)
        elif frame.msg_type == WSMsgType.CLOSE:
            transport.send_close(frame.get_close_code(), frame.get_close_message())
            transport.disconnect()

    def on_ws_disconnected(self, transport: WSTransport):
        self.room.discard(transport)


async def main():
    server = await ws_create_server(
        lambda request: Listener(request.path), "127.0.0.1", int(sys.argv[1])
    )
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
