"""A thread that runs passes where nobody who waits for them may: in an event loop, or always."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_AFTER_READER = 0.05
"""Seconds in which passes still run when nobody waits in an event loop: a reader comes back."""

_log = logging.getLogger("isobit.engine")


class PassThread:
    """There is one from when it is first needed until it is ended."""

    def __init__(
        self,
        changed: threading.Condition,
        step: Callable[[], bool],
        has_work: Callable[[], bool],
    ) -> None:
        """changed: notified of new work. step: a pass, False if there was nothing to do. has_work:
        whether there may be something, asked with ``changed`` held."""
        self._changed, self._step, self._has_work = changed, step, has_work
        self._thread: threading.Thread | None = None
        self._always = False
        """Whether it runs passes where nobody waits, too."""
        self._readers = 0
        """Who wait in event loops."""
        self._reader_left = 0.0
        """When the last of them took what it waited for."""

    @property
    def alive(self) -> bool:
        """Whether there is one."""
        thread = self._thread  # looked at once: another thread may be ending it
        return thread is not None and thread.is_alive()

    def start(self) -> None:
        """Run passes until :meth:`end`, whoever waits."""
        with self._changed:
            self._always = True
            self._begin()

    @contextmanager
    def awaited(self, require_open: Callable[[], None]) -> Iterator[None]:
        """While inside, an event loop waits for a pass, unless ``require_open`` raises."""
        with self._changed:
            require_open()
            self._begin()
            self._readers += 1
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                self._reader_left = time.monotonic()

    def end(self) -> threading.Thread | None:
        """It stops after its pass; to be joined where its pass is not kept from ending."""
        with self._changed:
            self._always = False
            thread, self._thread = self._thread, None
            self._changed.notify_all()
        return None if thread is threading.current_thread() else thread

    def _begin(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="isobit", daemon=True)
            self._thread.start()
        elif not self._readers:
            self._changed.notify_all()  # it may stand

    def _is_waited_for(self) -> bool:
        if self._always or self._readers:
            return True
        return time.monotonic() < self._reader_left + _AFTER_READER

    def _serve(self) -> None:
        me = threading.current_thread()
        while self._thread is me:
            try:
                if not (self._is_waited_for() and self._step()):
                    with self._changed:
                        self._changed.wait_for(
                            lambda: (
                                (self._has_work() and self._is_waited_for())
                                or self._thread is not me
                            )
                        )
            except Exception:  # those of the pass have it; the others go on
                _log.exception("a pass failed")
