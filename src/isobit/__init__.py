"""isobit: the same model file and the same tokens give the same bits on every backend.

    import isobit

    with isobit.load("sample") as model:
        print(model.generate("def read_lines(path):", max_tokens=32).text)

``load`` opens a model; everything else is a method of the ``Model`` that it returns. What goes
wrong on purpose is an ``isobit.errors.IsobitError``. docs/python.md shows all of it.
"""

from importlib import import_module

TYPE_CHECKING = False  # of typing, which takes longer to import than all of this
if TYPE_CHECKING:
    from typing import Any

    from isobit import errors as errors
    from isobit.config import EngineConfig as EngineConfig
    from isobit.config import ModelConfig as ModelConfig
    from isobit.runtime.generation import Completion as Completion
    from isobit.runtime.generation import Settings as Settings
    from isobit.runtime.generation import Stream as Stream
    from isobit.runtime.generation import Timings as Timings
    from isobit.runtime.model import Model as Model
    from isobit.runtime.model import load as load
    from isobit.runtime.sampler import Sampling as Sampling
    from isobit.runtime.tokens import Watcher as Watcher
    from isobit.verify.receipt import Recorder as Recorder

__version__ = "0.1.0"

_HOMES = {
    "load": "isobit.runtime.model",
    "Model": "isobit.runtime.model",
    "Completion": "isobit.runtime.generation",
    "Settings": "isobit.runtime.generation",
    "Stream": "isobit.runtime.generation",
    "Timings": "isobit.runtime.generation",
    "Watcher": "isobit.runtime.tokens",
    "Sampling": "isobit.runtime.sampler",
    "Recorder": "isobit.verify.receipt",
    "EngineConfig": "isobit.config",
    "ModelConfig": "isobit.config",
}
__all__ = [  # noqa: RUF022 - the door first, as help() shows it
    "load",
    "Model",
    "Completion",
    "Stream",
    "Timings",
    "Settings",
    "Sampling",
    "Watcher",
    "Recorder",
    "EngineConfig",
    "ModelConfig",
    "errors",
    "__version__",
]


def __getattr__(name: str) -> "Any":
    """Import the public names when they are first used, so that ``import isobit`` is quick."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name == "errors":
        return import_module("isobit.errors")
    raise AttributeError(f"module 'isobit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__} - {"Any", "TYPE_CHECKING", "import_module"})
