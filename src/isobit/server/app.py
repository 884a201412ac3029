"""The application: every route behind one guard, every error in its interface's shape."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from isobit.errors import IsobitError
from isobit.server import errors, openapi, webpage
from isobit.server.completing import Completing
from isobit.server.embeddings import Embeddings
from isobit.server.generate import Generate
from isobit.server.guard import Guard
from isobit.server.info import Info
from isobit.server.messages import Messages
from isobit.server.replaying import Replaying
from isobit.server.responses import Responses
from isobit.server.service import Service


def build(service: Service) -> ASGIApp:
    """The application that serves it."""
    interfaces = (Completing, Responses, Messages, Embeddings, Generate, Replaying, Info)
    routes = [route for interface in interfaces for route in interface(service).routes()]
    told = (HTTPException, IsobitError, ValidationError, Exception)
    handlers: dict[Any, Any] = dict.fromkeys(told, errors.answer)
    page = webpage.routes() if service.page else []
    app = Starlette(routes=[*routes, openapi.route(routes), *page], exception_handlers=handlers)
    guard = Guard(app, service, public=frozenset(route.path for route in page))
    if not service.origins:
        return guard
    every = ("*",)
    return CORSMiddleware(guard, service.origins, allow_methods=every, allow_headers=every)
