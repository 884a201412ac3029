"""Digests of large files, kept so that a file is read once for it and not at every start.

A digest is kept under what the system says of the file that was read: device, inode, size and the
times of its content and of its inode, of which nobody can set the last. A file that has changed has
another name here, and is read again.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

SMALLEST = 64 << 20  # bytes of a model that takes long enough to read
_SETTLED = 2_000_000_000  # ns after which a change would have given a file another time
_DIGEST = re.compile(r"[0-9a-f]{64}")


def folder() -> Path:
    """Where they are kept: ``isobit/sha256`` in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return Path(base or Path.home() / ".cache") / "isobit" / "sha256"


def known(files: Sequence[os.stat_result]) -> str | None:
    """The digest of a model's files one after the other, if it is kept."""
    with suppress(OSError, ValueError, RuntimeError):  # RuntimeError: no home
        kept = (folder() / _name(files)).read_text("ascii").strip()
        if _worth(files) and _DIGEST.fullmatch(kept):
            return kept
    return None


def keep(files: Sequence[os.stat_result], digest: str) -> None:
    """Keep it, if the files were as they are since before they could change unseen."""
    if not _worth(files) or max(map(_latest, files)) > time.time_ns() - _SETTLED:
        return
    with suppress(OSError, RuntimeError):  # then the next start reads again
        import tempfile  # noqa: PLC0415 - 5 ms that a start does not need

        folder().mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder(), delete=False) as file:
            file.write(digest + "\n")
        Path(file.name).replace(folder() / _name(files))


def _worth(files: Sequence[os.stat_result]) -> bool:
    return bool(files) and sum(f.st_size for f in files) >= SMALLEST


def _latest(file: os.stat_result) -> int:
    return max(file.st_mtime_ns, file.st_ctime_ns)


def _name(files: Sequence[os.stat_result]) -> str:
    said = [(f.st_dev, f.st_ino, f.st_size, f.st_mtime_ns, f.st_ctime_ns) for f in files]
    return hashlib.sha256(repr(said).encode()).hexdigest()[:32]
