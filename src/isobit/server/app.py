"""The application: every route behind one guard, every error in its interface's shape."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from isobit.server import errors, openapi, webpage
from isobit.server.anthropic.messages import Messages
from isobit.server.guard import FromFront, Guard
from isobit.server.info import Info
from isobit.server.openai.completions import Completions
from isobit.server.openai.embeddings import Embeddings
from isobit.server.openai.responses import Responses
from isobit.server.replay import Replay
from isobit.server.service import Service
from isobit.server.sglang.generate import Generate
from isobit.server.stop import Stop


def build(service: Service) -> ASGIApp:
    """The application that serves it."""
    interfaces = (Completions, Responses, Messages, Embeddings, Generate, Replay, Stop, Info)
    routes = [route for interface in interfaces for route in interface(service).routes()]
    page = webpage.routes() if service.page else []
    app = Starlette(
        routes=[*routes, openapi.route(routes), *page], exception_handlers=errors.HANDLERS
    )
    inside = FromFront(app, service.front_key)
    guard = Guard(inside, service, public=frozenset(route.path for route in page))
    return for_pages(guard, service.origins)


def for_pages(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """Let in the scripts of pages from these origins."""
    if not origins:
        return app
    every = ("*",)
    return CORSMiddleware(app, origins, allow_methods=every, allow_headers=every)
