"""The engine behind the server: its thread, its name and its counts."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import Counter
from types import TracebackType
from typing import Self

from isobit import numerics
from isobit.runtime.engine import Engine
from isobit.runtime.model import Model
from isobit.runtime.scheduler import Limits


class Service:
    """One model, served. A context manager: the engine's thread runs within it."""

    def __init__(
        self,
        model: Model,
        *,
        name: str | None = None,
        api_key: str | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.model = model
        self.name = name or model.path.stem
        self.api_key = api_key
        self.engine = Engine(model, limits)
        self.created = int(time.time())
        planes = 8 * model.engine.activation_planes
        self.fingerprint = (
            f"isobit-n{numerics.VERSION}-s{numerics.SAMPLING_VERSION}-a{planes}-"
            f"{model.file.sha256()[:16]}"
        )
        self.counts: Counter[tuple[str, str]] = Counter()
        """(a metric's name, its labels) -> count."""
        self._thread = threading.Thread(target=self._run, name="isobit engine", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.engine.close()
        self._thread.join()

    def _run(self) -> None:
        while True:
            try:
                self.engine.run()
            except Exception:  # those of the pass were told; the others go on
                traceback.print_exc(file=sys.stderr)
            else:
                return

    def metrics(self) -> str:
        """In Prometheus's text format."""
        scheduler, blocks = self.engine.scheduler, self.engine.scheduler.blocks
        gauges = {
            "isobit_requests_running": len(scheduler.running),
            "isobit_requests_waiting": len(scheduler.waiting),
            "isobit_cache_pages_held": blocks.held,
            "isobit_cache_pages_cached": blocks.cached,
            "isobit_cache_pages_free": blocks.free,
        }
        lines = [f"# TYPE {name} gauge\n{name} {value}" for name, value in gauges.items()]
        last = ""
        for (name, labels), count in sorted(self.counts.items()):
            if name != last:
                lines.append(f"# TYPE {name} counter")
            lines.append(f"{name}{labels} {count}")
            last = name
        return "\n".join(lines) + "\n"
