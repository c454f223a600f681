"""The ConnectionManager of FastAPI's WebSocket page, behind a middleware that wraps `send`."""

import sys

import uvicorn

from .connection_manager import app
from .wrapped import Wrapped

if __name__ == "__main__":
    app.add_middleware(Wrapped)
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning", access_log=False)
