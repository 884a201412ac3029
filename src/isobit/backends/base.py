"""What a backend is: a model's weights made ready on a device, and a forward pass over a batch.

A backend is created by ``open_backend(name, ...)`` in :mod:`isobit.backends` and passed around;
there is no global one. Sequences and pages are decided above (:mod:`isobit.runtime.kv_cache`); a
backend only owns the memory of its pages.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]

Tap = Callable[[str, int | None, NDArray[np.generic]], None]
"""Receives (stage, layer, array) for each traced stage, in graph order; stages are named in
:mod:`isobit.model.stages`."""


@dataclass(frozen=True)
class Batch:
    """Tokens to run in one pass; they may belong to several sequences.

    tokens, positions, sequence: int32 [T]; ``sequence[i]`` is the row of ``pages`` that token i
    belongs to. pages: int32 [S, P], page ``pages[s, p]`` holding positions 64p … 64p+63 of sequence
    s. A sequence's tokens are contiguous and ascending in position. logit_rows: int32 [R], the
    tokens whose logits are wanted.
    """

    tokens: I32
    positions: I32
    sequence: I32
    pages: I32
    logit_rows: I32
    states: I32 | None = None
    """int32 [S]: where each sequence's recurrent state lies, for models that have one: a number
    below the engine's max_sequences. None: sequence s has state s. It is zero where the sequence's
    tokens begin at position 0."""


class Backend(Protocol):
    """A model on a device.

    A device that can may also have ``greedy(tokens, positions, pages, count)``, decode steps whose
    logits stay there: int32 [count, sequences], the likeliest token after each, or None where it
    ran nothing; and ``read_bandwidth()`` of its memory, in bytes a second, for ``isobit bench``.
    """

    name: str

    @property
    def device(self) -> str:
        """The device in words, e.g. a processor's name and the SIMD level in use."""

    def forward(
        self, batch: Batch, tap: Tap | None = None, stages: frozenset[str] | None = None
    ) -> F32:
        """Run a batch, append its keys and values to their pages, return logits [R, vocabulary].

        ``tap`` receives the stages named in ``stages`` (all but those ``ON_REQUEST``, if None); it
        changes no bit. A backend may leave out stages that are ON_REQUEST, and no others.
        """

    def close(self) -> None:
        """Free the device's memory; the backend cannot be used afterwards."""
