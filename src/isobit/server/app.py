"""The application: every route behind one guard, every error in its interface's shape."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from isobit.errors import IsobitError
from isobit.server import errors, openapi
from isobit.server.completing import Completing
from isobit.server.embeddings import Embeddings
from isobit.server.generate import Generate
from isobit.server.guard import FromFront, Guard
from isobit.server.info import Info
from isobit.server.messages import Messages
from isobit.server.responses import Responses
from isobit.server.service import Service


def build(service: Service) -> ASGIApp:
    """The application that serves it."""
    interfaces = (Completing, Responses, Messages, Embeddings, Generate, Info)
    routes = [route for interface in interfaces for route in interface(service).routes()]
    told = (HTTPException, IsobitError, ValidationError, Exception)
    handlers: dict[Any, Any] = dict.fromkeys(told, errors.answer)
    app = Starlette(routes=[*routes, openapi.route(routes)], exception_handlers=handlers)
    return Guard(FromFront(app, service.front_key), service)
