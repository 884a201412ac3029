"""The calling side of the process that renders chat templates (sandbox.py says why there is one).

Owns that process: starts it with the first template, about 0.1 s, keeps it for the next, and
starts another after one that had to be stopped.
"""

import atexit
import contextlib
import json
import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isobit.errors import BackendUnavailable, ModelRefused, UsageError
from isobit.text.messages import MAX_BYTES

if TYPE_CHECKING:
    import subprocess

MAX_TEMPLATE = 256 * 1024  # characters; known models' templates have up to 30 thousand


class TemplateFailed(ModelRefused):
    """A template that cannot be rendered with these variables; perhaps they are at fault."""

    def __init__(self, reason: str) -> None:
        """Say why."""
        super().__init__(f"chat template: cannot be rendered: {reason}")
        self.reason = reason


class Renderer:
    """Renders one template at a time, within limits; threads wait for each other."""

    def __init__(self, seconds: float = 5.0, megabytes: int = 512) -> None:
        """Set the limits of one rendering; nothing starts yet."""
        self._seconds = seconds
        self._megabytes = megabytes
        self.forget()

    def forget(self) -> None:
        """Begin anew in a forked process, which must not share its parent's renderer."""
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def render(
        self, template: str, contexts: list[dict[str, Any]], now: float | None = None
    ) -> list[str]:
        """The text of a template for each of several sets of variables.

        ``now``, in seconds since 1970, is what strftime_now takes the time for; None: the clock's.

        Raises:
            UsageError: the template refuses the messages, or they do not fit into JSON.
            TemplateFailed: the template is damaged or hostile, or cannot render this, or not within
                time and memory.
            ModelRefused: it is too long.
            BackendUnavailable: the process cannot be started.
        """
        if len(template) > MAX_TEMPLATE:
            raise ModelRefused(
                f"chat template: expected at most {MAX_TEMPLATE} characters, found {len(template)}"
            )
        try:
            request = json.dumps({"template": template, "contexts": contexts, "now": now})
        except (ValueError, RecursionError) as error:
            raise UsageError(f"messages: expected what JSON can hold: {error}") from None
        reply = self._ask(request)
        if reply is None:
            raise TemplateFailed(
                f"it does not render within {self._seconds:g} s and {self._megabytes} MB"
            )
        if "rejected" in reply:
            raise UsageError(f"chat template: it refuses these messages: {reply['rejected']}")
        if "failed" in reply:
            raise TemplateFailed(reply["failed"])
        texts: list[str] = reply["texts"]
        return texts

    def close(self) -> None:
        """Stop the process; the next template starts another."""
        with self._lock:
            self._stop()

    def _ask(self, request: str) -> Any:
        """The reply to one line of JSON, or None if the process did not survive it."""
        with self._lock:
            if self._process is not None and self._process.poll() is not None:
                self._stop()  # something else ended it since, short of memory perhaps
            process = self._process = self._process or self._start()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(request + "\n")
                process.stdin.flush()
                return json.loads(process.stdout.readline())
            except (OSError, ValueError):
                self._stop()
                return None
            except BaseException:  # Ctrl-C: the next request must not read this one's reply
                self._stop()
                raise

    def _start(self) -> "subprocess.Popen[str]":
        import subprocess  # noqa: PLC0415 - 4 ms that a start does not need

        limits = (self._seconds, self._megabytes, MAX_BYTES)
        script = Path(__file__).with_name("sandbox.py")
        # Of the environment it gets only where libraries are; the working directory is not one.
        path = [entry for entry in sys.path if Path(entry).is_absolute()]
        kept = {name: os.environ[name] for name in ("SYSTEMROOT", "TZ") if name in os.environ}
        try:
            process = subprocess.Popen(
                [sys.executable, "-S", "-P", "-B", str(script), *map(str, limits)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=kept | {"PYTHONPATH": os.pathsep.join(path)},
                encoding="ascii",
                start_new_session=True,  # Ctrl-C in a terminal is for the caller alone
            )
        except OSError as error:
            raise BackendUnavailable(
                f"chat template: cannot start Python to render it: {error}"
            ) from None
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            process.kill()
            process.communicate()
            raise BackendUnavailable(
                "chat template: the process that renders it did not start; is jinja2 installed?"
            )
        return process

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            # A broken pipe: what was not yet written is lost with the process.
            with contextlib.suppress(OSError):
                process.communicate()


RENDERER = Renderer()
atexit.register(RENDERER.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=RENDERER.forget)
