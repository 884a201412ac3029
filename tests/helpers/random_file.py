"""A model file of random tensors, with their values as it holds them."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import gguf
import numpy as np
from numpy.typing import NDArray

from isobit.arrays import F32


class RandomFile:
    """A GGUF file being written by the ``gguf`` package.

    ``values``: what a reader finds, float32 by the tensors' names.
    """

    seed: ClassVar[int | None] = None
    """Of every file's weights, where figures of them are to be printed again; None: fresh ones."""

    def __init__(
        self,
        path: Path,
        arch: str,
        keys: dict[str, object],
        fmt: str = "Q8_0",
        others: Mapping[str, object] | None = None,
    ) -> None:
        """``fmt``: the usual one of matrices; ``others``: keys without the architecture's name."""
        self._fmt = fmt
        self._writer = gguf.GGUFWriter(path, arch)
        seed = self.seed
        if seed is None:
            seed = int(np.random.SeedSequence().generate_state(1)[0])
        print(f"weights of {arch}: seed {seed}")
        self.rng = np.random.default_rng(seed)
        self.values: dict[str, F32] = {}
        for key, value in keys.items():
            self._key(f"{arch}.{key}", value)
        for key, value in (others or {}).items():
            self._key(key, value)

    def _key(self, key: str, value: object) -> None:
        w = self._writer
        match value:
            case bool():
                w.add_bool(key, value)
            case int():
                w.add_uint32(key, value)
            case float():
                w.add_float32(key, value)
            case str():
                w.add_string(key, value)
            case _:
                w.add_array(key, value)  # type: ignore[arg-type]

    def matrix(self, name: str, *shape: int, fmt: str | None = None, spread: float = 1.0) -> None:
        """Values of that spread over the root of the row's length, in a format."""
        x = self.rng.standard_normal(shape) * (spread * shape[-1] ** -0.5)
        kind = gguf.GGMLQuantizationType[fmt or self._fmt]
        blocks = gguf.quants.quantize(x.astype(np.float32), kind)
        self._writer.add_tensor(name, blocks, raw_dtype=kind)
        self.values[name] = gguf.quants.dequantize(blocks, kind)

    def vector(self, name: str, *shape: int, about: float = 1.0, spread: float = 0.1) -> None:
        """Float32 values about a number."""
        self.put(name, about + spread * self.rng.standard_normal(shape))

    def put(self, name: str, values: NDArray[np.floating]) -> None:
        """A tensor of float32."""
        self.values[name] = values.astype(np.float32)
        self._writer.add_tensor(name, self.values[name])

    def close(self) -> dict[str, F32]:
        """Write the file; its values."""
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_tensors_to_file()
        self._writer.close()
        return self.values
