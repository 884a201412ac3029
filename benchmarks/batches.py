"""What the benchmarks of the GPU backends run, and what they say of where they ran."""

import contextlib
import platform
from datetime import UTC, datetime
from pathlib import Path
from unittest.mock import patch

import numpy as np

from isobit.backends.base import Batch
from isobit.backends.hardware import nvidia_driver


def origin(model, commit):
    """What a result file begins with."""
    return {
        "model": Path(model).name,
        "commit": commit,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": platform.platform(),
        "driver": nvidia_driver(),
    }


@contextlib.contextmanager
def patched(changes):
    """With other values of these: (module or class, name, value) each."""
    with contextlib.ExitStack() as stack:
        for of, name, value in changes:
            stack.enter_context(patch.object(of, name, value))
        yield


def batch(tokens, start, pages, rows=()):
    """Tokens of one sequence from position ``start`` on, with the logits of ``rows``."""
    n = len(tokens)
    return Batch(
        np.array(tokens, np.int32),
        np.arange(start, start + n, dtype=np.int32),
        np.zeros(n, np.int32),
        pages,
        np.array(rows, np.int32),
    )
