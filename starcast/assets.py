"""Assets: the files for web pages that the package has, as a mount answers GET with them."""

from __future__ import annotations

import functools
import gzip
import hashlib
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

FOLDER = Path(__file__).parent / "static"

# There is no registered type for TypeScript, and `.ts` stands for videos in most tables.
TYPES = {"starcast.js": "text/javascript", "starcast.d.ts": "text/plain"}


@functools.cache
def _read(name: str) -> tuple[bytes, bytes, str]:
    """Return a file as it is and compressed, and a hash of it."""
    content = (FOLDER / name).read_bytes()
    return content, gzip.compress(content, mtime=0), hashlib.sha256(content).hexdigest()[:16]


def respond(request: Request, name: str) -> Response:
    """Return the response with a file.

    A browser asks each time whether its copy is still the newest, so that a page never runs the
    script of another version than the server's for longer than until it is loaded again.
    """
    content, compressed, digest = _read(name)
    zipped = "gzip" in request.headers.get("accept-encoding", "")
    tag = f'"{digest}-gzip"' if zipped else f'"{digest}"'
    headers = {"Cache-Control": "no-cache", "ETag": tag, "Vary": "Accept-Encoding"}
    known = [each.strip() for each in request.headers.get("if-none-match", "").split(",")]
    if tag in known or f"W/{tag}" in known:  # a proxy that compresses makes tags weak
        return Response(status_code=304, headers=headers)
    if zipped:
        headers["Content-Encoding"] = "gzip"
    return Response(compressed if zipped else content, headers=headers, media_type=TYPES[name])
