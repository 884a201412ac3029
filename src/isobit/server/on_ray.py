"""The former place of :mod:`isobit.server.front.on_ray`, kept for a release."""

from isobit.server.front.on_ray import app

__all__ = ["app"]
