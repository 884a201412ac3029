"""Host memory for results that is lent out and used again once nothing refers to it any more."""

from collections.abc import Callable
from typing import Any
from weakref import finalize

import numpy as np

from isobit.arrays import F32

_MOST = 8  # buffers


class _Owner:
    """What arrays over a lent buffer keep alive: when it goes, the buffer is free again."""

    def __init__(self, buffer: F32) -> None:
        self.__array_interface__: dict[str, Any] = buffer.__array_interface__


class PinnedBuffers:
    """Buffers that the device knows, each lent to one result at a time."""

    def __init__(self, register: Callable[[F32], None], forget: Callable[[F32], None]) -> None:
        """register: tells the device of a buffer, which then copies to it at full speed."""
        self._register, self._forget = register, forget
        self.registered: dict[int, F32] = {}
        """By address."""
        self._free: list[int] = []

    def __call__(self, count: int, *, more: bool = True) -> F32:
        """Memory for float32 [count]; when all buffers are lent, any, or if there are to be no
        ``more``."""
        sizes = {self.registered[at].size: at for at in self._free}
        if fitting := [size for size in sizes if size >= count]:
            self._free.remove(at := sizes[min(fitting)])
            buffer = self.registered[at]
        else:
            buffer = np.empty(count, np.float32)
            if not more or (len(self.registered) == _MOST and not sizes):
                return buffer
            if len(self.registered) == _MOST:  # one that is too small goes
                self._free.remove(at := sizes[min(sizes)])
                self._forget(self.registered.pop(at))
            self._register(buffer)
            self.registered[at := buffer.ctypes.data] = buffer
        owner = _Owner(buffer[:count])
        finalize(owner, self._free.append, at).atexit = False
        return np.asarray(owner)
