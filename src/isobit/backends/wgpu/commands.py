"""Commands of passes: recorded once for each shape, encoded for each pass, the next one's ahead."""

from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from isobit.backends.base.row_results import RowRequest
from isobit.backends.wgpu.device.gpu import Copy, Device, Recording, Step
from isobit.backends.wgpu.lowering import Pass
from isobit.errors import BackendUnavailable

_RECORDINGS = 16  # kept for passes of the same shape


class Commands:
    """Of one backend.

    ``steps``: of the pass, if the last argument says so, of some logits, and of what is asked of
    them; ``copies``: what comes to the host behind these.
    """

    def __init__(
        self,
        device: Device,
        steps: Callable[[Pass, RowRequest | None, bool], list[Step]],
        copies: Callable[[Pass, RowRequest | None], list[Copy]],
    ) -> None:
        self._device = device
        self._steps, self._copies = steps, copies
        self._generation = device.generation
        self._recordings: OrderedDict[tuple[Pass, bool, RowRequest | None], Recording] = (
            OrderedDict()
        )
        self._ahead: dict[tuple[Pass, RowRequest | None], Any] = {}
        """Commands encoded before they are wanted."""
        self._unused: list[Any] = []
        """Those that nobody can want any more. A command that is dropped and not submitted keeps
        its memory and all buffers that it names (wgpu-native 29.0): they are submitted at the end.
        """

    def of(self, p: Pass, asked: RowRequest | None, *, traced: bool) -> Any:
        """To be submitted now; ``traced``: the pass has run, and only its logits are wanted."""
        if self._generation != self._device.generation:
            self.retire()
        ahead = None if traced else self._ahead.pop((p, asked), None)
        return self.encode(p, asked, traced=traced) if ahead is None else ahead

    def encode_ahead(self, p: Pass, asked: RowRequest | None) -> None:
        """For a pass that may come next."""
        self._ahead[p, asked] = self.encode(p, asked, traced=False)

    def retire(self) -> None:
        """Recordings, and commands made of them, no longer hold."""
        self._generation = self._device.generation
        self._recordings.clear()
        self._unused += self._ahead.values()
        self._ahead.clear()

    def close(self) -> None:
        """Let go of all, before the device is closed."""
        self.retire()
        with suppress(BackendUnavailable), self._device.guarded():
            while self._unused:
                self._device.submit(self._unused.pop())

    def encode(self, p: Pass, asked: RowRequest | None, *, traced: bool) -> Any:
        """The pass (at the first row of logits, unless it has run traced), some logits, and what is
        asked of them."""
        key = p, traced and p.first == 0, asked
        if key not in self._recordings:
            steps = self._steps(p, asked, p.first == 0 and not traced)
            recording = self._device.record(steps)
            if self._generation != self._device.generation:
                self.retire()
            self._recordings[key] = recording
            if len(self._recordings) > _RECORDINGS:
                self._recordings.popitem(last=False)
        self._recordings.move_to_end(key)
        copies = (c for c in self._copies(p, asked) if c[-1])
        return self._device.encode(self._recordings[key], *copies)
