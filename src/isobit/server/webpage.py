"""``/``: a page to talk with the model, as its files lie in ``page/``; they ask nobody else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from importlib import resources
from importlib.resources.abc import Traversable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

HEADERS = {
    "cache-control": "no-cache",  # kept, but asked for again: an answer of 304
    "content-security-policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "object-src 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-dns-prefetch-control": "off",  # for links in what a model writes
}
_KINDS = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "LICENSE": "text/plain; charset=utf-8",
}


def routes() -> list[Route]:
    """A route for each file, read now."""
    root = resources.files("isobit.server") / "page"
    found = dict(_files(root, "/page/"))
    found["/"] = found.pop("/page/index.html")
    return [_route(path, file.read_bytes()) for path, file in found.items()]


def _files(folder: Traversable, path: str) -> Iterator[tuple[str, Traversable]]:
    for each in folder.iterdir():
        if each.is_dir():
            yield from _files(each, f"{path}{each.name}/")
        elif each.name.rpartition(".")[2] in _KINDS:
            yield path + each.name, each


def _route(path: str, content: bytes) -> Route:
    kind = _KINDS["html" if path == "/" else path.rpartition("/")[2].rpartition(".")[2]]
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = HEADERS | {"content-type": kind, "etag": tag}

    async def file(request: Request) -> Response:
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers)

    return Route(path, file)
