"""A model file's tensors by name; each missing or misshapen one is refused."""

import re

from isobit.errors import ModelRefused
from isobit.gguf.reader import GGUFFile, TensorInfo
from isobit.numerics import Weight


class Tensors:
    """Tensor look-ups by name and shape. Matrices stay quantised views into the mapped file."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        self.source = str(file.path)
        self._taken: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._file.tensors

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

    def rows(self, name: str) -> int:
        """Rows of a matrix."""
        shape = self._find(name).shape
        if len(shape) > 2:
            raise ModelRefused(f"{self.source}: {name}: expected a matrix, got shape {shape}")
        return int(shape[0]) if len(shape) == 2 else 1

    def take(self, name: str, *shape: int) -> Weight:
        """A tensor of that shape."""
        info = self._find(name)
        if info.shape not in (shape, written(shape)):
            raise ModelRefused(f"{self.source}: {name}: expected shape {shape}, got {info.shape}")
        return Weight(name, info.format, shape, self._file.data(name))

    def _find(self, name: str) -> TensorInfo:
        self._taken.add(name)
        try:
            return self._file.tensors[name]
        except KeyError:
            raise ModelRefused(
                f"{self.source}: tensor {name}: expected in the file, not found"
            ) from None


def written(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape as ggml writes it: it drops first dimensions of 1, the only expert's for example."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape
