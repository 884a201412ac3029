"""Who may run a pass: one thread at a time, and whoever waits for what a pass brings."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from isobit.errors import UsageError


class PassLock(ABC):
    """The turn to run passes, and the lock on what they read and change."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        """Held by whoever reads or changes the books, for a moment. Who has the turn may read the
        requests that are in its pass without it: nobody else changes those."""
        self._changed = threading.Condition(self._lock)
        """Notified of what somebody may wait for."""
        self._busy = 0
        """The thread that has the turn, runs a pass; 0 if none does. One that finds itself here was
        interrupted (Ctrl-C) as it gave its turn back."""
        self._stepping = False
        """Whether that pass is one for generations."""
        self._asking = 0
        """Threads that wait for a turn of their own."""

    def step(self) -> bool:
        """One pass for all; False if there was nothing to do."""
        with self._turn(asked=False):
            return self._step()

    def advance(self, there: Callable[[], bool]) -> None:
        """Run a pass, unless that of another thread brings what is waited for."""
        me, mine = threading.get_ident(), False
        try:  # as in turn(), without its cost for every token
            with self._lock:
                if self._stepping:
                    self._require_no_pass(me)
                while not (found := there()) and (self._busy not in (0, me) or self._asking):
                    self._changed.wait()
                if found:
                    return
                mine, self._busy = True, me
            self._step()
        finally:
            if mine:
                self._busy = 0  # before any call, at which Ctrl-C might come
                with self._lock:
                    self._changed.notify_all()

    def turn(self) -> AbstractContextManager[None]:
        """While inside, nobody else runs a pass. Comes before the next pass."""
        return self._turn(asked=True)

    @contextmanager
    def _turn(self, *, asked: bool) -> Iterator[None]:
        """``asked``: those who run pass after pass let it go first."""
        me, mine = threading.get_ident(), False
        try:
            with self._lock:
                self._require_no_pass(me)
                self._asking += asked
                try:
                    while self._busy not in (0, me) or (self._asking and not asked):
                        self._changed.wait()
                finally:
                    self._asking -= asked
                    self._changed.notify_all()
                mine, self._busy = True, me
            yield
        finally:
            if mine:
                self._busy = 0  # before any call, at which Ctrl-C might come
                with self._lock:
                    self._changed.notify_all()

    def _require_no_pass(self, thread: int) -> None:
        if self._stepping and self._busy == thread:
            raise UsageError("model: expected to be used between passes, not by what watches one")

    @abstractmethod
    def _step(self) -> bool:
        """Run a pass; False if there was nothing to do. The caller has the turn."""
