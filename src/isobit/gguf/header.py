"""The header of a GGUF file: metadata and tensor directory, checked before they are believed.

Owns the parsing. A file is hostile until checked: every count, length and offset is compared with
the bytes that are there before it is used, and whatever does not hold is a `ModelRefused` of one
line naming file, field, expected and got. No byte of a weight is touched.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np

from isobit.errors import ModelRefused, printable
from isobit.gguf.formats import FORMATS, Format, type_name

Value: TypeAlias = int | float | bool | str | list["Value"]

# Far above any real model (a 262k vocabulary: 1.4 M elements in 16 MiB); they bound the memory and
# the time that a hostile header can cost, however large the (perhaps sparse) file around it is.
HEADER_LIMIT = 64 << 20  # bytes of metadata and tensor directory
ELEMENT_LIMIT = 1 << 22  # array elements in all metadata together
COUNT_LIMIT = 1 << 16  # metadata keys; tensors; arrays in arrays

MAX_DIMS = 4
MAX_TENSOR_NAME = 64  # bytes
MAX_KEY = 65535  # bytes
MAX_NESTING = 4  # arrays in arrays
DEFAULT_ALIGNMENT = 32

_BOOL, _STRING, _ARRAY = 7, 8, 9
# fmt: off
_NUMBERS = {  # NumPy's names for the number types
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", _BOOL: "<u1",
    10: "<u8", 11: "<i8", 12: "<f8",
}
# fmt: on


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies and how to read it."""

    name: str
    shape: tuple[int, ...]  # slowest dimension first, as in NumPy (GGUF stores the reverse)
    format: Format
    offset: int  # bytes from the start of the file
    nbytes: int
    part: int = 0  # which file of a split model it lies in


@dataclass(frozen=True, slots=True)
class RefusedTensor:
    """A tensor of a type that is not implemented; its size is unknown and its place unchecked."""

    name: str
    shape: tuple[int, ...]
    type_name: str  # as ggml calls it, e.g. "IQ4_XS"


@dataclass(frozen=True, slots=True)
class Header:
    """What stands before the weights."""

    version: int
    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]
    refused: dict[str, RefusedTensor]


def read_header(path: Path, file: BinaryIO, size: int) -> Header:
    """Read and check the header of ``file``, ``size`` bytes long; ``path`` is for messages."""
    cursor = _Cursor(path, file, size)
    version = cursor.version()
    n_tensors = cursor.count("tensor count", at_least=8 + 1 + 4 + 8 + 4 + 8)
    n_keys = cursor.count("metadata key count", at_least=8 + 1 + 4 + 1)
    metadata = cursor.metadata(n_keys)
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
        expected = "a power of two, at least 8"
        raise refusal(path, "metadata 'general.alignment'", expected, show(alignment))
    return Header(version, metadata, *cursor.tensors(n_tensors, alignment))


def show(value: Value) -> str:
    """A value from the file as an error message may quote it: short."""
    if isinstance(value, list):
        return f"an array of {len(value)}"
    return repr(value[:100] + "…" if isinstance(value, str) and len(value) > 100 else value)


def refusal(path: Path, field: str, expected: str, got: object) -> ModelRefused:
    """The error for a field that does not hold, in one line free of control characters."""
    line = f"{path}: {field}: expected {expected}, got {got}"
    return ModelRefused(printable(line))


class _Cursor:
    """Reads the header front to back, checking each read against the bytes that are left."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path = path
        self.file = file
        self.size = size
        self.end = min(size, HEADER_LIMIT)
        self.at = 0
        self.elements = 0
        self.arrays = 0

    def refusal(self, field: str, expected: str, got: object) -> ModelRefused:
        return refusal(self.path, field, expected, got)

    def version(self) -> int:
        """The magic and the version."""
        magic = self.file.read(4)
        if magic != b"GGUF":
            raise self.refusal("magic", "the four bytes b'GGUF'", magic)
        self.at = 4
        version = self.u32("version")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "big"), "little")
            big = f"a big-endian file (version {swapped})" if 0 < swapped < 1 << 16 else None
            raise self.refusal("version", "little-endian GGUF version 2 or 3", big or version)
        return version

    def count(self, field: str, at_least: int) -> int:
        """A number of entries of ``at_least`` bytes each."""
        n = self.u64(field)
        if n > COUNT_LIMIT:
            raise self.refusal(field, f"at most {COUNT_LIMIT}", n)
        self.need(n * at_least, field)
        return n

    def metadata(self, n_keys: int) -> dict[str, Value]:
        metadata: dict[str, Value] = {}
        for i in range(n_keys):
            key = self.string(f"metadata key {i}", MAX_KEY)
            field = f"metadata {show(key)}"
            if not key or key in metadata:
                raise self.refusal(field, "a name of its own", "a duplicate" if key else "nothing")
            metadata[key] = self.value(self.u32(f"{field} type"), field)
        return metadata

    def value(self, type_id: int, field: str) -> Value:
        if type_id == _STRING:
            return self.string(field)
        if type_id == _ARRAY:
            return self.array(field, depth=1)
        return self.numbers(type_id, 1, field)[0]

    def array(self, field: str, depth: int) -> list[Value]:
        if depth > MAX_NESTING:
            raise self.refusal(field, f"at most {MAX_NESTING} nested arrays", "more")
        type_id = self.u32(f"{field} element type")
        n = self.u64(f"{field} length")
        self.elements += n
        if self.elements > ELEMENT_LIMIT:
            raise self.refusal(
                f"{field} length", f"at most {ELEMENT_LIMIT} array elements in all", self.elements
            )
        if type_id == _STRING:
            return self.strings(n, field)
        if type_id == _ARRAY:
            self.need(n * 12, field)
            self.arrays += n
            if self.arrays > COUNT_LIMIT:
                expected = f"at most {COUNT_LIMIT} arrays in arrays in all"
                raise self.refusal(f"{field} length", expected, self.arrays)
            return [self.array(f"{field}[{i}]", depth + 1) for i in range(n)]
        return self.numbers(type_id, n, field)

    def strings(self, n: int, field: str) -> list[Value]:
        """The one loop that runs 300,000 times for a large vocabulary: kept free of calls."""
        self.need(n * 8, field)
        read, length, at, end = self.file.read, struct.Struct("<Q").unpack, self.at, self.end
        out: list[Value] = []
        try:
            for _ in range(n):
                (size,) = length(read(8))
                at += 8 + size
                if at > end:
                    break
                out.append(read(size).decode())
        except struct.error:  # fewer than 8 bytes left
            at = end + 1
        except UnicodeDecodeError as error:
            raise self.refusal(f"{field}[{len(out)}]", "UTF-8", error.reason) from None
        if at > end:
            raise self.refusal(f"{field}[{len(out)}]", "a string", f"one beyond {self.limit}")
        self.at = at
        return out

    def numbers(self, type_id: int, n: int, field: str) -> list[Value]:
        dtype = _NUMBERS.get(type_id)
        if dtype is None:
            raise self.refusal(f"{field} type", "a GGUF value type 0 to 12", type_id)
        width = int(dtype[2:])
        raw = np.frombuffer(self.read(n * width, field), dtype)
        if type_id == _BOOL:
            if (raw > 1).any():
                raise self.refusal(field, "a boolean stored as 0 or 1", raw.max())
            raw = raw.astype(np.bool_)
        values: list[Value] = raw.tolist()
        return values

    def tensors(
        self, n: int, alignment: int
    ) -> tuple[dict[str, TensorInfo], dict[str, RefusedTensor]]:
        """The tensor directory; the data starts at the next multiple of ``alignment`` after it."""
        entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for i in range(n):
            name = self.string(f"name of tensor {i}", MAX_TENSOR_NAME)
            field = f"tensor {show(name)}"
            if not name or name in entries:
                raise self.refusal(field, "a name of its own", "a duplicate" if name else "nothing")
            n_dims = self.u32(f"{field} dimension count")
            if not 1 <= n_dims <= MAX_DIMS:
                raise self.refusal(f"{field} dimension count", f"1 to {MAX_DIMS}", n_dims)
            dims = [self.u64(f"{field} dimensions") for _ in range(n_dims)]
            if 0 in dims:
                raise self.refusal(f"{field} dimensions", "every one at least 1", dims)
            ggml_type = self.u32(f"{field} type")
            entries[name] = tuple(reversed(dims)), ggml_type, self.u64(f"{field} offset")

        start = self.at + -self.at % alignment
        tensors: dict[str, TensorInfo] = {}
        refused: dict[str, RefusedTensor] = {}
        for name, (shape, ggml_type, offset) in entries.items():
            if ggml_type in FORMATS:
                tensors[name] = self.placed(name, shape, FORMATS[ggml_type], start, offset)
                if offset % alignment:
                    field = f"tensor {show(name)} offset"
                    raise self.refusal(field, f"a multiple of the alignment {alignment}", offset)
            else:
                refused[name] = RefusedTensor(name, shape, type_name(ggml_type))
        for a, b in pairwise(sorted(tensors.values(), key=lambda t: t.offset)):
            if a.offset + a.nbytes > b.offset:
                raise self.refusal(
                    f"tensor {show(b.name)} offset",
                    f"{a.offset + a.nbytes} or more, where {show(a.name)} ends",
                    b.offset,
                )
        return tensors, refused

    def placed(
        self, name: str, shape: tuple[int, ...], fmt: Format, start: int, offset: int
    ) -> TensorInfo:
        """A tensor's place in the file, checked to lie inside it."""
        field = f"tensor {show(name)}"
        if shape[-1] % fmt.block_size:
            expected = f"a multiple of {fmt.block_size} values for {fmt.name}"
            raise self.refusal(f"{field} row length", expected, shape[-1])
        nbytes = fmt.nbytes(math.prod(shape))  # Python integers: no overflow
        if start + offset + nbytes > self.size:
            raise self.refusal(
                field,
                f"its end within the file's {self.size} bytes",
                f"{nbytes} bytes of shape {list(shape)} from {start + offset}",
            )
        return TensorInfo(name, shape, fmt, start + offset, nbytes)

    def string(self, field: str, limit: int = HEADER_LIMIT) -> str:
        n = self.u64(f"{field} length")
        if n > limit:
            raise self.refusal(f"{field} length", f"at most {limit} bytes", n)
        try:
            return self.read(n, field).decode()
        except UnicodeDecodeError as error:
            raise self.refusal(field, "UTF-8", f"{error.reason} at byte {error.start}") from None

    def u32(self, field: str) -> int:
        return self.unsigned(4, field)

    def u64(self, field: str) -> int:
        return self.unsigned(8, field)

    def unsigned(self, width: int, field: str) -> int:
        return int.from_bytes(self.read(width, field), "little")

    def read(self, n: int, field: str) -> bytes:
        """The next ``n`` bytes."""
        self.need(n, field)
        self.at += n
        return self.file.read(n)

    def need(self, n: int, field: str) -> None:
        """Refuse if fewer than ``n`` bytes are left."""
        if n > self.end - self.at:
            got = f"{self.end - self.at} up to {self.limit}"
            raise self.refusal(field, f"{n} bytes or more", got)

    @property
    def limit(self) -> str:
        """What the header must not reach beyond, in words."""
        if self.end == self.size:
            return "the end of the file"
        return f"the limit for headers, {HEADER_LIMIT} bytes"
