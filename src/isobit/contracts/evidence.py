"""Evidence: what was measured, on what, by which code. One JSON file a contract, backend and model.

It is believed as far as it still speaks of the code that is there: every file carries a digest of
the sources that its figures depend on.
"""

import hashlib
import json
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from isobit import __version__
from isobit.config import without_planes
from isobit.errors import FileRefused, UsageError, shown
from isobit.files import regular

FORMAT = 1
MAX_BYTES = 16 << 20
Outcome = Literal["passed", "failing", "not run"]

_PACKAGE = Path(__file__).resolve().parents[1]
_SHARED = (
    *("config.py", "numerics", "gguf", "model", "runtime", "backends/base"),
    *("backends/__init__.py", "text"),
    "machine.py",
    *("verify", "contracts/check.py", "contracts/kinds.py", "contracts/measure.py"),
    *("contracts/measure_alone.py", "contracts/measure_speed.py", "contracts/target.py"),
)
_SOURCES = frozenset({".py", ".cpp", ".h", ".cu", ".cuh", ".wgsl"})


@dataclass(frozen=True)
class Result:
    """What became of one falsification test."""

    test: str
    kind: str
    outcome: Outcome
    reason: str = ""
    """Why it is failing or was not run."""
    measure: dict[str, Any] = field(default_factory=dict)
    """The measure as the contract had it."""
    figures: dict[str, float] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    """What else was noted: how many values were compared, single runs, …"""
    seconds: float = 0.0


@dataclass(frozen=True)
class Evidence:
    """One run of a contract's measures on one backend with one model."""

    contract: str
    """The contract file's stem."""
    contract_version: str
    created: str
    """ISO 8601, UTC."""
    backend: str
    device: str | None
    """None if the backend was not available."""
    driver: str | None
    machine: dict[str, str]
    model: dict[str, Any]
    """name, sha256, architecture, layers, vocabulary."""
    seed: int
    """Of everything random in the run."""
    commit: str | None
    """None if there was no repository to ask; "+" at its end: files had changed since."""
    code: str
    """Digest of the sources that the figures depend on, see :func:`code_digest`."""
    numerics: int
    activation_bits: int
    """Of the measures that do not say their own."""
    results: list[Result]
    isobit: str = __version__
    format: int = FORMAT

    def save(self, folder: Path) -> Path:
        """Write into a folder, in place of an earlier file of this backend and model."""
        name = f"{self.backend}-{Path(str(self.model.get('name', 'none'))).stem}.json"
        path = folder / name
        part = path.with_name(name + ".part")  # what is there stays until this is whole
        try:
            folder.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(asdict(self), indent=1, allow_nan=False) + "\n", "utf-8")
            part.replace(path)
        except (OSError, ValueError) as error:
            raise UsageError(f"{path}: cannot write the evidence: {error}") from None
        return path

    @classmethod
    def load(cls, path: Path) -> "Evidence":
        """Read and check a file; raises FileRefused."""
        try:
            with regular(path, "evidence").open("rb") as file:
                text = file.read(MAX_BYTES + 1)
            if len(text) > MAX_BYTES:
                raise FileRefused(f"{path}: expected at most {MAX_BYTES} bytes, got more")
            data = json.loads(text)
        except (OSError, ValueError, RecursionError) as error:
            raise FileRefused(f"{path}: expected evidence in JSON, got: {error}") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise FileRefused(f"{path}: expected evidence of format {FORMAT}; check again")
        data = without_planes(data, str(path))
        _require_types(data, cls, path)
        data["results"] = [_result(r, path) for r in data["results"]]
        return cls(**data)


def _require_types(data: Any, of: type, path: Path) -> None:
    """Raises FileRefused unless a mapping has the fields of a class, each of its type."""
    names = [f.name for f in fields(of)]
    if not isinstance(data, dict) or set(data) != {*names}:
        raise FileRefused(f"{path}: expected the keys {', '.join(names)}; check again")
    for name, kind in get_type_hints(of).items():
        if not _holds(kind, data[name]):
            raise FileRefused(f"{path}: {name}: expected another type, got {shown(data[name])}")


def _holds(kind: Any, value: object) -> bool:
    """Whether a value is of a field's type; what is in a list or a mapping is not asked."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if isinstance(kind, UnionType):
        return type(value) in get_args(kind)
    return type(value) is (get_origin(kind) or kind)


def _result(data: Any, path: Path) -> Result:
    _require_types(data, Result, path)
    for name, figure in data["figures"].items():
        if type(figure) is not float:
            raise FileRefused(f"{path}: {name}: expected a figure, got {shown(figure)}")
    return Result(**data)


def load_all(folder: Path) -> list[Evidence]:
    """Every file of a folder, by name; none if there is no such folder."""
    return [Evidence.load(p) for p in sorted(folder.glob("*.json"))] if folder.is_dir() else []


def default_folder(contract: Path) -> Path:
    """Where a contract's evidence lies: evidence/STEM beside it."""
    return contract.parent / "evidence" / contract.stem


@cache
def code_digest(backends: frozenset[str]) -> str:
    """SHA-256 over the names and contents of the sources that these backends' figures depend on:
    the specification, the reader, the graph, the runtime, the backends themselves, and what
    compares them."""
    digest = hashlib.sha256()
    for path in _files((*_SHARED, *(f"backends/{b}" for b in sorted(backends)))):
        digest.update(f"{path.relative_to(_PACKAGE).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _files(names: Iterable[str]) -> list[Path]:
    found: set[Path] = set()
    for name in names:
        path = _PACKAGE / name
        found |= {path} if path.is_file() else set(path.rglob("*"))
    return sorted(p for p in found if p.suffix in _SOURCES and "__pycache__" not in p.parts)


def commit() -> str | None:
    """The commit of the repository that the running code is part of; None for code that is not,
    such as what was installed into an environment that lies in some repository."""
    try:
        _git("ls-files", "--error-unmatch", "__init__.py")
        revision = _git("rev-parse", "--short=12", "HEAD").strip()
        return revision + ("+" if _git("status", "--porcelain", "--", ".").strip() else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_PACKAGE), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout


def machine() -> dict[str, str]:
    """The operating system and processor, Python and NumPy."""
    from numpy import __version__ as numpy  # noqa: PLC0415

    system = f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}".rstrip(
        ", "
    )
    return {"system": system, "python": platform.python_version(), "numpy": numpy}
