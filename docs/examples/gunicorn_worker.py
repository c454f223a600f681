from uvicorn_worker import UvicornWorker


class BroadcastWorker(UvicornWorker):
    CONFIG_KWARGS = UvicornWorker.CONFIG_KWARGS | {"ws": "starcast.uvicorn:BroadcastProtocol"}
