"""A model file's tensors by name; each missing or misshapen one is refused."""

import re
from collections.abc import Sequence

from isobit.errors import ModelRefused
from isobit.gguf.reader import GGUFFile, TensorInfo
from isobit.numerics import Weight


class Tensors:
    """Tensor look-ups by name and shape. Matrices stay quantised views into the mapped file."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        self.source = str(file.path)
        self._taken: set[str] = set()
        self._parts: dict[str, tuple[str, int, int]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._file.tensors or name in self._parts

    def split(self, whole: str, parts: Sequence[tuple[str, int]]) -> None:
        """Let a tensor that some files have in the place of several, their rows one after the
        other, stand for them; ``parts``: name and rows. Nothing if the file has it not."""
        if whole not in self._file.tensors or any(name in self._file.tensors for name, _ in parts):
            return
        rows, found = sum(n for _, n in parts), self._find(whole).shape
        if found[0] != rows:
            names = ", ".join(name for name, _ in parts)
            raise ModelRefused(
                f"{self.source}: {whole}: expected {rows} rows, those of {names}, got {found[0]}"
            )
        start = 0
        for name, n in parts:
            self._parts[name] = (whole, start, n)
            start += n

    def nothing_else(self) -> None:
        """Refuse a tensor that no role took, such as a bias: without it the model is another."""
        for name in self._file.tensors:
            if name not in self._taken:
                raise ModelRefused(
                    f"{self.source}: tensor {name!r}: expected only tensors of the "
                    "architecture, got one that is not implemented"
                )

    def leave_out_layers(self, first: int) -> None:
        """Take no notice of the tensors of layers from a number on."""
        for name in self._file.tensors:
            layer = re.match(r"blk\.(\d+)\.", name)
            if layer and int(layer[1]) >= first:
                self._taken.add(name)

    def leave_out(self, name: str) -> None:
        """Take no notice of a tensor, which the file may have or not."""
        self._taken.add(name)

    def rows(self, name: str) -> int:
        """Rows of a matrix."""
        shape = self._find(name).shape
        if len(shape) > 2:
            raise ModelRefused(f"{self.source}: {name}: expected a matrix, got shape {shape}")
        return int(shape[0]) if len(shape) == 2 else 1

    def take(self, name: str, *shape: int) -> Weight:
        """A tensor of that shape."""
        if name in self._parts:
            return self._part(name, *shape)
        info = self._find(name)
        if info.shape not in (shape, written(shape)):
            raise ModelRefused(f"{self.source}: {name}: expected shape {shape}, got {info.shape}")
        return Weight(name, info.format, shape, self._file.data(name))

    def _part(self, name: str, *shape: int) -> Weight:
        whole, start, n = self._parts[name]
        found = self.take(whole, *self._find(whole).shape)
        expected = (n, *found.shape[1:])
        if expected != shape:
            raise ModelRefused(
                f"{self.source}: {whole}: expected shape {shape} of {name}, got {expected}"
            )
        size = found.data.size // found.shape[0]
        return Weight(name, found.format, shape, found.data[start * size : (start + n) * size])

    def _find(self, name: str) -> TensorInfo:
        self._taken.add(name)
        try:
            return self._file.tensors[name]
        except KeyError:
            called = self._file.called.get(name, name)
            raise ModelRefused(
                f"{self.source}: tensor {called}: expected in the file, not found"
            ) from None


def written(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape as ggml writes it: it drops first dimensions of 1, the only expert's for example."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape
