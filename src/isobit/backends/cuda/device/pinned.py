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

    def __init__(self, register: Callable[[F32], None]) -> None:
        """register: tells the device of a buffer, which then copies to it at full speed."""
        self._register = register
        self.registered: list[F32] = []
        self._free: dict[int, list[F32]] = {}

    def __call__(self, count: int, *, more: bool = True) -> F32:
        """Memory for float32 [count]; when all buffers are lent, any, or if there are to be no
        ``more``."""
        free = self._free.setdefault(count, [])
        if free:
            buffer = free.pop()
        else:
            buffer = np.empty(count, np.float32)
            if len(self.registered) == _MOST or not more:
                return buffer
            self._register(buffer)
            self.registered.append(buffer)
        owner = _Owner(buffer)
        finalize(owner, free.append, buffer).atexit = False
        return np.asarray(owner)
