"""The files of a checkpoint: safetensors, checked before they are believed, and JSON.

Owns the maps. Layout: https://github.com/huggingface/safetensors#format
"""

import json
import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isobit.errors import shown
from isobit.gguf.formats import BF16, F16, F32, Format
from isobit.gguf.header import refusal, show

HEADER_LIMIT = 64 << 20  # bytes; 100,000 tensors have a tenth of it
JSON_LIMIT = 64 << 20

_TYPES: dict[str, Format] = {"F32": F32, "F16": F16, "BF16": BF16}
_NUMPY = {F32: "<f4", F16: "<f2", BF16: "<u2"}  # BF16 as its 16 bits


@dataclass(frozen=True)
class Stored:
    """A tensor in a map: ``array`` is read-only, uint16 for BF16."""

    format: Format
    array: NDArray[Any]


def read_bytes(path: Path, limit: int = JSON_LIMIT) -> bytes:
    """A regular file of at most so many bytes. Raises ModelRefused."""
    _require_regular(path)
    try:
        with path.open("rb") as file:
            found = file.read(limit + 1)
    except OSError as error:
        raise refusal(path, "file", "a readable file", error.strerror) from None
    if len(found) > limit:
        raise refusal(path, "file", f"at most {limit} bytes", "more")
    return found


def _require_regular(path: Path) -> None:
    if path.exists() and not path.is_file():  # opening a pipe would wait for its writer
        raise refusal(path, "file", "a regular file", "something else")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ModelRefused."""
    try:
        found = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise refusal(path, "file", "JSON", error) from None
    if not isinstance(found, dict):
        raise refusal(path, "file", "a JSON object", type(found).__name__)
    return found


def shard_paths(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in order. Raises ModelRefused."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    where = read_json(index).get("weight_map")
    names: set[Any] = set(map(str, where.values())) if isinstance(where, dict) and where else {None}
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or "\\" in name:
            raise refusal(index, "weight_map", "names of files beside it", show(str(name)))
    return [folder / name for name in sorted(names)]


def map_shard(path: Path) -> tuple[NDArray[np.uint8], dict[str, Stored], os.stat_result]:
    """A file's bytes, the tensors in them, and its state. Raises ModelRefused."""
    _require_regular(path)
    try:
        with path.open("rb") as file:
            state = os.fstat(file.fileno())
            contents = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise refusal(path, "file", "a readable file", reason) from None
    size = int.from_bytes(contents[:8].tobytes(), "little")
    if not 2 <= size <= min(HEADER_LIMIT, contents.size - 8):
        raise refusal(path, "header length", "one within the file", size)
    try:
        header = json.loads(contents[8 : 8 + size].tobytes())
    except (ValueError, RecursionError) as error:
        raise refusal(path, "header", "JSON", error) from None
    if not isinstance(header, dict):
        raise refusal(path, "header", "a JSON object", type(header).__name__)
    data = contents[8 + size :]
    found = {
        name: _stored(path, name, entry, data)
        for name, entry in header.items()
        if name != "__metadata__"
    }
    return contents, found, state


def _stored(path: Path, name: str, entry: object, data: NDArray[np.uint8]) -> Stored:
    field = f"tensor {show(name)}"
    found: Mapping[str, object] = entry if isinstance(entry, dict) else {}
    dtype = found.get("dtype")
    fmt = _TYPES.get(dtype) if isinstance(dtype, str) else None
    if fmt is None:
        raise refusal(path, f"{field} type", "BF16, F16 or F32", shown(dtype))
    shape: Any = found.get("shape")
    at: Any = found.get("data_offsets")
    if not _counts(shape) or not _counts(at) or len(at) != 2 or not 1 <= len(shape) <= 4:
        raise refusal(path, field, "a shape of 1 to 4 sizes and two offsets", "something else")
    start, end = at
    if not 0 < end - start == fmt.nbytes(math.prod(shape)) or end > data.size:
        got = f"bytes {start} to {end} for shape {shape}"
        raise refusal(path, field, f"its {fmt.name} values within the file", got)
    return Stored(fmt, data[start:end].view(_NUMPY[fmt]).reshape(shape))


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in value)
