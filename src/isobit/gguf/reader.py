"""An open GGUF file: its checked header, typed metadata, and views of its weights.

Owns the memory maps, one a file of a split model. Opening a file reads its header alone; a weight
is read from disk when the bytes that `GGUFFile.data` returns are looked at.
"""

import contextlib
import hashlib
import mmap
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from isobit.errors import UsageError
from isobit.gguf import digests, not_gguf
from isobit.gguf.formats import FORMATS
from isobit.gguf.header import Header, TensorInfo, Value, read_header, refusal, show
from isobit.gguf.split import joined, part_paths
from isobit.machine import total_memory

__all__ = ["GGUFFile", "TensorInfo", "Value"]


class GGUFFile:
    """Metadata, tensor directory and views into the map. A context manager.

    A split model is opened by any of its parts and is one file from then on: ``path`` is that of
    the first part, ``paths`` are all. Immutable once open, so threads may share it. Views from
    `data` stay valid after `close`.
    """

    def __init__(self, paths: Sequence[Path], header: Header, maps: Sequence[mmap.mmap]) -> None:
        """Use `GGUFFile.open`."""
        self.path = paths[0]
        self.paths = tuple(paths)
        self.version = header.version
        self.metadata = header.metadata
        self.tensors = header.tensors
        self.refused = header.refused  # empty unless opened with strict=False
        self.called: Mapping[str, str] = {}  # keys and tensors, where what was opened has others
        self.file_size = sum(map(len, maps))
        contents = tuple(np.frombuffer(m, np.uint8) for m in maps)
        self._contents: tuple[NDArray[np.uint8], ...] | None = contents
        self._sha256: str | None = None
        self._files: dict[Path, os.stat_result] = {}  # as they were when they were mapped

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, strict: bool = True) -> Self:
        """Map ``path``, and the other parts of the model if it is split, and check the headers.

        A tensor of a type that is not implemented is refused; with ``strict=False`` it is listed
        in ``refused`` instead, so that a file can be inspected that cannot be run.
        Raises ModelRefused.
        """
        path = Path(path)
        if (wrong := not_gguf.explain(path)) is not None:
            raise wrong
        opened = _map(path)
        paths = part_paths(path, opened[0])
        parts = [opened if p == path else _map(p, len(paths)) for p in paths]
        header = joined([(p, h) for p, (h, _, _) in zip(paths, parts, strict=True)])
        maps = [m for _, m, _ in parts]
        if hasattr(mmap, "MADV_HUGEPAGE") and sum(map(len, maps)) < total_memory():
            # What is read from now on comes in pages of 2 MB where the system has them: fewer
            # reads from disk, and a tenth more speed where memory is what decoding waits for.
            for m in maps:
                with contextlib.suppress(OSError):
                    m.madvise(mmap.MADV_HUGEPAGE)
        if strict and header.refused:
            first, *_ = header.refused.values()
            found = not_gguf.not_readable(r.type_name for r in header.refused.values())
            known = "one of " + ", ".join(f.name for f in FORMATS.values())
            raise refusal(paths[0], f"type of tensor {show(first.name)}", known, found)
        opened_file = cls(paths, header, maps)
        for p, (_, _, state) in zip(paths, parts, strict=True):
            opened_file._files[p.absolute()] = state
        return opened_file

    def close(self) -> None:
        """Let go of the map; it is unmapped when the last view into it is gone."""
        self._contents = None

    def __enter__(self) -> Self:
        """Return the file itself."""
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the file."""
        self.close()

    def data(self, name: str) -> NDArray[np.uint8]:
        """The bytes of tensor ``name``: uint8, 1-D, read-only, a view into the map."""
        info = self.tensors.get(name)
        if info is None:
            raise refusal(self.path, f"tensor {show(name)}", "a tensor of that name", "none")
        return self._mapped()[info.part][info.offset : info.offset + info.nbytes]

    def sha256(self, progress: Callable[[int, int], None] | None = None) -> str:
        """Hex digest of the whole file.

        The first call reads everything, but for a file whose digest is kept since an earlier time
        (:mod:`isobit.gguf.digests`).

        Of a split model, that of its parts one after the other: ``cat NAME-*.gguf | sha256sum``.
        ``progress(done, total)`` is called in bytes, every 16 MiB. Raises what
        `check_unchanged` does.
        """
        if self._sha256 is None:
            self._sha256 = self._digest(progress)
        return self._sha256

    def _digest(self, progress: Callable[[int, int], None] | None) -> str:
        """Of the files, one after the other."""
        states = tuple(self._files.values())
        if (known := digests.known(states)) is not None:
            return known
        digest, step, done = hashlib.sha256(), 16 << 20, 0
        self.check_unchanged()
        for contents in self._mapped():
            for start in range(0, contents.size, step):
                piece = contents[start : start + step]
                digest.update(piece.data)
                done += piece.size
                if progress is not None:
                    progress(done, self.file_size)
        self.check_unchanged()
        digests.keep(states, digest.hexdigest())
        return digest.hexdigest()

    @property
    def states(self) -> list[tuple[int, int, int, int]]:
        """Of each file: device, inode, bytes and time of modification when it was mapped."""
        every = self._files.values()
        return [(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for s in every]

    def check_unchanged(self) -> None:
        """Raise ModelRefused if a file has another size or modification time than as it was mapped.

        Reading what is gone would end the process (SIGBUS), and other bytes are another model.
        """
        for path, was in self._files.items():
            with contextlib.suppress(OSError):  # removed: the map keeps what it was
                now = path.stat()
                if (now.st_dev, now.st_ino) != (was.st_dev, was.st_ino):
                    continue
                if now.st_size != was.st_size:
                    expected = f"{was.st_size} bytes, as when it was opened"
                    raise refusal(path, "file", expected, f"{now.st_size}; load it again")
                if now.st_mtime_ns != was.st_mtime_ns:
                    expected = "the modification time that it had when it was opened"
                    got = "another, so its bytes may be others too; load it again"
                    raise refusal(path, "file", expected, got)

    @property
    def mapped(self) -> list[tuple[Path, NDArray[np.uint8]]]:
        """Each file and its bytes."""
        return list(zip(self.paths, self._mapped(), strict=False))

    def _mapped(self) -> tuple[NDArray[np.uint8], ...]:
        if self._contents is None:
            raise UsageError(f"{self.path}: the file is closed")
        return self._contents


def _map(path: Path, parts: int = 1) -> tuple[Header, mmap.mmap, os.stat_result]:
    """The checked header, the map and the state of one file, of a model of so many ``parts``."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
            kind = "a directory" if path.is_dir() else "something else"
            raise refusal(path, "file", "a regular file", kind)
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            size = found.st_size
            header = read_header(path, file, size)
            return header, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ), found
    except (OSError, ValueError) as error:  # ValueError: NUL in path, shrunk file
        reason = error.strerror if isinstance(error, OSError) else error
        what = "a readable file"
        if parts > 1:
            what = f"one of the model's {parts} parts, which belong in one folder"
        raise refusal(path, "file", what, reason) from None
