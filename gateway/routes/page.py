"""GET /: the chat page. Its files are in gateway/web, built from the sources in web/ by `make page`."""

from __future__ import annotations

import functools
import gzip
import hashlib
import re
from dataclasses import dataclass
from importlib.resources import files

from fastapi import APIRouter, Request
from starlette.responses import Response

router = APIRouter()

_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.svg": ("page.svg", "image/svg+xml"),
}
PATHS = frozenset(path.encode() for path in _FILES)
"""Open to all: the page holds nothing secret and asks for the key that /v1 wants."""

_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self'",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
    "trusted-types": "dompurify",
}
_HEADERS = {
    "content-security-policy": "; ".join(f"{name} {value}" for name, value in _POLICY.items()),
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",  # kept, but asked for each time: a new version shows at once
    "vary": "accept-encoding",
}
_TAKES_GZIP = re.compile(r"(?:^|[\s,])gzip\s*(?:,|$|;\s*q=(?!0(?:\.0*)?\s*(?:,|$)))", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    zipped: bytes
    etag: str  # weak: the same for both
    media_type: str


@functools.cache
def _read(path: str) -> _File:
    name, media_type = _FILES[path]
    content = files("gateway").joinpath("web", name).read_bytes()
    etag = f'W/"{hashlib.sha256(content).hexdigest()[:32]}"'
    return _File(content, gzip.compress(content, mtime=0), etag, media_type)


async def get_file(request: Request) -> Response:
    """The file at this path, or 304 to who has it already."""
    file = _read(request.url.path)
    headers = _HEADERS | {"etag": file.etag}
    known = [tag.strip() for tag in request.headers.get("if-none-match", "").split(",")]
    if file.etag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    if _TAKES_GZIP.search(request.headers.get("accept-encoding", "")):
        return Response(
            file.zipped, headers=headers | {"content-encoding": "gzip"}, media_type=file.media_type
        )
    return Response(file.content, headers=headers, media_type=file.media_type)


for _path in _FILES:
    router.add_api_route(_path, get_file, methods=["GET", "HEAD"], include_in_schema=False)
