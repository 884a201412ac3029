"""Launches that come again and again, as graphs."""

from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

from isobit.backends.cuda.device.protocol import Gpu

MAX_GRAPHS = 8
"""Graphs that are kept, of each :class:`GraphCache`."""

K = TypeVar("K", bound=Hashable)


class Captures(Generic[K]):
    """Graphs of launches that are known beforehand: each is captured when it is first asked for,
    or all of them ahead."""

    def __init__(
        self, gpu: Gpu, queue: Callable[[K], Callable[[], None]], keys: Iterable[K]
    ) -> None:
        """queue: what launches the one of a key, once memory is there."""
        self._gpu, self.queue, self.keys = gpu, queue, tuple(keys)
        self.made: dict[K, object] = {}
        """So far."""

    def __getitem__(self, key: K) -> object:
        if key not in self.made:
            self.made[key] = self._gpu.capture(self.queue(key))
        return self.made[key]


class GraphCache:
    """Queues launches; what comes for the second time is captured, and replayed from then on,
    until it is ``closed``.

    One by one a thousand launches take the host longer than some GPUs need to run them. But to
    capture them takes tens of ms, for which all that generate would wait: whoever serves has
    captured beforehand what comes often, and closes it.
    """

    def __init__(self, gpu: Gpu) -> None:
        self._gpu, self.closed = gpu, False
        self._seen: set[Hashable] = set()
        self._graphs: dict[Hashable, object] = {}

    def __call__(self, key: Hashable, queue: Callable[[], None]) -> None:
        """Queue what ``queue`` launches: always the same for a key."""
        room = len(self._graphs) < MAX_GRAPHS and not self.closed
        if key in self._seen and room and self._gpu.may_wait:
            self._graphs[key] = self._gpu.capture(queue)
            self._seen.remove(key)
        if key in self._graphs:
            self._gpu.replay(self._graphs[key])
            return
        if len(self._seen) < 64 * MAX_GRAPHS:  # else there is no end to what comes once
            self._seen.add(key)
        queue()
