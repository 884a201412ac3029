"""A function of yours in the place of an operation: is your kernel the specification's, to the bit?

``STAGE=MODULE:FUNCTION``: the function makes that stage in every layer. It gets the operation's
inputs as arrays, one row a token, and gives one of the same shape and type as the reference; of an
operation with weights, such as a product, the first argument is the weights
(``isobit.numerics.Weight``, several as a tuple). An operation with several outputs gives a tuple.
"""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from isobit.backends.reference import ReferenceBackend
from isobit.backends.reference.backend import Compute
from isobit.config import EngineConfig
from isobit.errors import UsageError, did_you_mean
from isobit.model.graph import Op
from isobit.model.weights import Weights
from isobit.numerics.ops import Array, Arrays

Function = Callable[..., Any]


def parse(text: str) -> tuple[str, Function]:
    """``STAGE=MODULE:FUNCTION``; the module is looked for in the current folder too.

    Raises UsageError.
    """
    stage, _, place = text.partition("=")
    module, _, name = place.partition(":")
    if not (stage and module and name):
        raise UsageError(f"--op: expected STAGE=MODULE:FUNCTION, got {text[:80]!r}")
    sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a script may end with sys.exit
        raise UsageError(f"--op: {place[:80]}: loading it raised {_said(error)}") from error
    finally:
        sys.path.remove("")
    if not callable(found):
        raise UsageError(f"--op: {place[:80]}: expected a function, got {type(found).__name__}")
    return stage, found


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


class WithFunctions(ReferenceBackend):
    """The reference with functions in the place of some stages' operations."""

    def __init__(
        self, weights: Weights, engine: EngineConfig, functions: Mapping[str, Function]
    ) -> None:
        """Raises UsageError for a stage that the model has not."""
        names = weights.graph.names
        for stage in functions:
            if stage not in names:
                near = did_you_mean(stage, names) or f"; expected one of {', '.join(names)}"
                raise UsageError(f"--op: no such stage: {stage!r}{near}")
        self._functions = functions
        super().__init__(weights, engine, self._hook_of)

    @property
    def device(self) -> str:
        """The device, and what is not the reference's own."""
        return f"{super().device}, with functions for {', '.join(self._functions)}"

    def _hook_of(self, op: Op, inputs: Sequence[Array], compute: Compute) -> Arrays:
        named = next((v.name for v in op.outputs if v.name in self._functions), None)
        if named is None:
            return compute(op, inputs)
        expected = compute(op, inputs)  # for its shapes; and an operation may keep a state
        weights = (op.weights[0] if len(op.weights) == 1 else op.weights,) if op.weights else ()
        copies = [np.array(x) for x in inputs]  # what it does to its inputs is its own affair
        try:
            made = self._functions[named](*weights, *copies)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise UsageError(f"--op {named}: the function raised {_said(error)}") from error
        found = made if isinstance(made, tuple) else (made,)
        if len(found) != len(expected):
            raise UsageError(f"--op {named}: expected {len(expected)} arrays, got {len(found)}")
        for x, y in zip(found, expected, strict=True):
            got = (getattr(x, "dtype", type(x).__name__), getattr(x, "shape", ()))
            if not isinstance(x, np.ndarray) or got != (y.dtype, y.shape):
                raise UsageError(
                    f"--op {named}: expected {y.dtype} of shape {y.shape}, got {got[0]} of {got[1]}"
                )
        return found
