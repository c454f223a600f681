"""picows, its core API, on uvloop."""

import sys

import uvloop
from picows import WSFrame, WSListener, WSMsgType, WSTransport, ws_create_server

clients = set()


class Listener(WSListener):
    def on_ws_connected(self, transport: WSTransport):
        clients.add(transport)

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame):
        if frame.msg_type == WSMsgType.TEXT:
            message = frame.get_payload_as_bytes()
            for client in clients:
                client.send(WSMsgType.TEXT, message)
        elif frame.msg_type == WSMsgType.CLOSE:
            transport.send_close(frame.get_close_code(), frame.get_close_message())
            transport.disconnect()

    def on_ws_disconnected(self, transport: WSTransport):
        clients.discard(transport)


async def main():
    server = await ws_create_server(lambda request: Listener(), "127.0.0.1", int(sys.argv[1]))
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
