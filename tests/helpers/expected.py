"""What a test needs and may not find: skipped with the reason, or a failure where it is expected.

``ISOBIT_TEST_EXPECT`` names what must be there, with commas: "wgpu", "nvrtc", "torch",
"transformers", "chromium", "ray". ``.ci/run`` sets it, so that nothing it has installed is left
out in silence.
"""

import os
from importlib import import_module
from types import ModuleType
from typing import NoReturn

import pytest


def not_run(what: str, reason: str) -> NoReturn:
    """Skip a test, or fail it if ``what`` is expected here."""
    if what in os.environ.get("ISOBIT_TEST_EXPECT", "").split(","):
        pytest.fail(f"{what} is expected here (ISOBIT_TEST_EXPECT): {reason}")
    pytest.skip(f"not run: {reason}")


def needs(what: str, module: str) -> ModuleType:
    """Import a module that is an extra; see :func:`not_run`."""
    try:
        return import_module(module)
    except ImportError as error:
        not_run(what, str(error))
