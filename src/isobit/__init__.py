"""isobit: the same model file and the same tokens give the same bits on every backend."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isobit.runtime.generation import Completion as Completion
    from isobit.runtime.model import Model as Model
    from isobit.runtime.model import load as load

__version__ = "0.1.0"

_HOMES = {
    "load": "isobit.runtime.model",
    "Model": "isobit.runtime.model",
    "Completion": "isobit.runtime.generation",
}
__all__ = ["Completion", "Model", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used, so that ``import isobit`` is quick."""
    if name in _HOMES:
        from importlib import import_module  # noqa: PLC0415

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'isobit' has no attribute {name!r}")
