"""starcast on uvicorn, behind a middleware that wraps `send`."""

from .starcast import app, main
from .wrapped import Wrapped

if __name__ == "__main__":
    app.add_middleware(Wrapped)
    main()
