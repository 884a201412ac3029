"""What the backend asks of a device; a protocol, so that tests can emulate one."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from isobit.backends.cuda.device.load import Part

Array = NDArray[np.generic]


class Gpu(Protocol):
    """What the backend asks of a device (a protocol so that tests can emulate one)."""

    name: str
    multiprocessors: int
    shared_most: int
    """Shared memory that a block can have, in bytes."""
    cache_bytes: int
    """The device's own cache of its memory (L2), in bytes."""
    warpgroups: bool
    """Whether it has Hopper's products of warpgroups."""

    @property
    def may_wait(self) -> bool:
        """Whether the driver may be asked now for what might wait for a device: see
        :meth:`reach`."""

    @property
    def alone(self) -> bool:
        """Whether no other part of a model is on this device."""

    def activate(self) -> None:
        """Make this the calling thread's device; before anything else in a thread."""

    def reach(self, others: "Sequence[Gpu]") -> None:
        """Let kernels of this device write to the others' memory, and wait for theirs. From then on
        nothing is asked of the driver for which it might wait for a device, but while it is
        rehearsed."""

    def rehearsal(self) -> contextlib.AbstractContextManager[None]:
        """Kernels and graphs that are queued meanwhile do not run: they are compiled, loaded and
        captured. What is uploaded arrives, what is downloaded is zero."""

    def compile(self, queue: Callable[[], None], step: Callable[[int, int], None]) -> int:
        """Have the kernels compiled that ``queue`` launches, by all processors, and launch none.
        How many had to be; ``step`` is told: done, of so many."""

    def memory(self) -> tuple[int, int]:
        """Free and total bytes."""

    def allocate(self, nbytes: int) -> int:
        """Address of new memory, aligned to 256 bytes."""

    def free(self, address: int) -> None:
        """Give memory back."""

    def upload(self, address: int, values: Array) -> None:
        """Queue a copy to the device; ``values`` may be changed when this returns, unless they are
        page-locked: then once a later mark has passed."""

    def bring(self, parts: "Sequence[Part]") -> Callable[[], None]:
        """Begin to bring parts of tensors to their places, and go on. What is queued after the
        return of what this returns finds them there."""

    def page_locked(self, nbytes: int) -> NDArray[np.uint8]:
        """Host memory that the device reads by itself; uint8 [nbytes]."""

    def free_page_locked(self, values: NDArray[np.uint8]) -> None:
        """Give it back."""

    def results(self, count: int) -> NDArray[np.float32]:
        """Host memory for results, float32 [count]: the device writes to it at full speed."""

    def mark(self) -> object:
        """A point in the queue."""

    def wait(self, mark: object) -> None:
        """Wait until the device has passed a point; each mark once."""

    def fetch(self, address: int, out: Array) -> None:
        """Queue a copy from the device to page-locked memory, done once a later mark has passed."""

    def download(self, address: int, out: Array) -> None:
        """Copy from the device after all that is queued; done when this returns."""

    def copy(self, source: int, target: int, nbytes: int) -> None:
        """Queue a copy on the device."""

    def launch(
        self,
        stem: str,
        kernel: str,
        grid: Sequence[int],
        arguments: Sequence[int | float],
        *,
        shared: int = 0,
        defines: Mapping[str, str] | None = None,
        cooperative: bool = False,
        overlap: bool = False,
    ) -> None:
        """Queue a kernel of ``stem``.cu compiled with ``defines``; ``shared``: dynamic bytes.

        cooperative: all blocks run at once. overlap: it may start before the kernel ahead of it has
        ended, and waits for it by itself.
        """

    def capture(self, queue: Callable[[], None]) -> object:
        """Record what ``queue`` launches as a graph, without running it."""

    def replay(self, graph: object) -> None:
        """Queue a graph."""

    def close(self) -> None:
        """Free everything that was allocated."""
