"""What a measure is taken of: a model on a backend, and whether both are those that it means."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from isobit.contracts import kinds
from isobit.errors import FileRefused, NotRun
from isobit.files import regular
from isobit.gguf.reader import GGUFFile
from isobit.runtime.model import Model, sample_path
from isobit.verify.blame import texts
from isobit.verify.diff import Diff
from isobit.verify.trace import ModelRun
from isobit.verify.verify import verify


@dataclass
class Measured:
    """The figures of one measure, and what else is worth keeping."""

    figures: dict[str, float]
    about: dict[str, Any] = field(default_factory=dict)
    most: dict[str, float] = field(default_factory=dict)
    """Counts: what each could come to at most here, with everything wrong."""
    where: dict[str, list[str]] = field(default_factory=dict)
    """For a figure that is out of bounds: where, in words."""


class Target:
    """A model on the backend under test, with what it is compared to. A context manager."""

    def __init__(
        self, model: Model, name: str, root: Path, seed: int, peer: str | None = None
    ) -> None:
        self.model = model
        self.name = name
        """The backend's, as it was asked for."""
        self.text = texts(model.detokenize)
        self.root = root
        self.rng = np.random.default_rng(seed)
        self.peer = peer
        self._stack = ExitStack()
        self._others: dict[str, Model] = {}
        self._diffs: dict[tuple[str, tuple[int, ...]], Diff] = {}

    def __enter__(self) -> "Target":
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def other(self, backend: str) -> Model:
        """The same file on another backend. Raises NotRun for the one under test: compared with
        itself, it would agree on anything."""
        if backend == self.name:
            raise NotRun(f"against: expected another backend than {backend} itself")
        if backend not in self._others:
            opened = Model(self.model.path, backend, self.model.engine)
            self._others[backend] = self._stack.enter_context(opened)
        return self._others[backend]

    def diff(self, against: str, prompt: Sequence[int]) -> Diff:
        """The comparison with another backend, made once for each prompt."""
        key = (against, tuple(prompt))
        if key not in self._diffs:
            self._diffs[key] = verify(self.model, ModelRun(self.other(against)), prompt)
        return self._diffs[key]


def text_file(root: Path, name: str) -> bytes:
    """A text of the repository that a measure names. Raises NotRun for one that is not there, lies
    elsewhere, or is no file: a device might never end."""
    path = root / name
    try:
        if not path.resolve().is_relative_to(root.resolve()):
            raise NotRun(f"text: expected a file of the repository, got {name}")
        return regular(path, "a text").read_bytes()
    except (OSError, ValueError, FileRefused) as error:
        raise NotRun(f"text: expected {name}, got: {error}") from None


def require_model(needs: kinds.ModelNeeds | None, model: Model) -> None:
    """Raises NotRun for a model that a measure does not speak of."""
    if needs is None:
        return
    c = model.config
    is_sample = needs.sample and model.file.sha256() == sample_digest()
    for name, wanted, got in (
        ("sample", needs.sample or None, is_sample),
        ("vocabulary", needs.vocabulary, c.vocab),
        ("layers", needs.layers, c.n_layers),
        ("hidden", needs.hidden, c.hidden),
        ("experts", needs.experts, c.n_experts),
    ):
        if wanted is not None and got != wanted:
            what = "the sample model" if name == "sample" else f"a model with {name} {wanted}"
            found = "another" if name == "sample" else got
            raise NotRun(f"model: expected {what}, got {found}")
    size = sum(path.stat().st_size for path in model.file.paths) / 1e9
    if needs.file_gb is not None and not needs.file_gb.holds(size):
        raise NotRun(f"model: expected files of {needs.file_gb} GB, got {size:.3g}")


@cache
def sample_digest() -> str:
    """SHA-256 of the sample model."""
    with GGUFFile.open(sample_path()) as file:
        return file.sha256()


def require_device(needs: kinds.DeviceNeeds | None, model: Model) -> None:
    """Raises NotRun for a device that a measure does not speak of."""
    if needs is None:
        return
    device = model.backend.device
    if needs.name is not None and needs.name.lower() not in device.lower():
        raise NotRun(f"device: expected {needs.name}, got {device}")
    if needs.memory_gb is not None:
        total = memory(model)[1] / 1e9
        if not needs.memory_gb.holds(total):
            raise NotRun(f"device: expected {needs.memory_gb} GB of memory, got {total:.1f}")


def require_named(measure: kinds.Measure) -> None:
    """Raises NotRun for speed or memory of just any model, which a small one always has enough of,
    and for tokens a second or a share of the memory of just any device."""
    alone = set(measure.threshold) - {"ratio_to_peer", "used_gb"}
    if measure.model is None or not measure.model.named:
        raise NotRun(f"{measure.kind}: expected a measure that says which model it means")
    if alone and (measure.device is None or not measure.device.named):
        raise NotRun(f"{sorted(alone)[0]}: expected a measure that says which device it means")


def memory(model: Model) -> tuple[int, int]:
    """Bytes in use and bytes in all where the model's weights lie; raises NotRun if unknown."""
    if not model.backend.on_host:
        device = model.backend.memory()
        if device is None:
            raise NotRun(f"memory: {model.backend.name} does not say how much its device has")
        return device.total - device.free, device.total
    try:
        status = Path("/proc/self/status").read_text("ascii")
        machine = Path("/proc/meminfo").read_text("ascii")
    except OSError:
        raise NotRun("memory: expected /proc, which this system does not have") from None
    used = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    total_line = next(line for line in machine.splitlines() if line.startswith("MemTotal:"))
    return int(used.split()[1]) << 10, int(total_line.split()[1]) << 10
