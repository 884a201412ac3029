"""From a file's tensor names to the roles they play; each missing or misshapen one is refused."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isobit.config import ModelConfig, architecture
from isobit.errors import ModelRefused
from isobit.gguf.reader import GGUFFile, TensorInfo
from isobit.numerics import Weight

F32 = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Layer:
    """One transformer layer. The feed-forward's three weights are stacks [experts, rows, columns]
    when ``router`` is given, plain matrices otherwise."""

    attn_norm: F32
    q: Weight
    k: Weight
    v: Weight
    q_norm: F32
    k_norm: F32
    attn_output: Weight
    ffn_norm: F32
    router: Weight | None
    gate: Weight
    up: Weight
    down: Weight


@dataclass(frozen=True, eq=False)
class Weights:
    """A model's tensors by role; matrices stay quantised views into the mapped file."""

    config: ModelConfig
    token_embd: Weight
    layers: tuple[Layer, ...]
    output_norm: F32
    output: Weight

    @classmethod
    def from_file(cls, file: GGUFFile) -> "Weights":
        """Find and check every tensor. Touches no matrix; norm vectors are read."""
        architecture(file.metadata, str(file.path))
        take = _Tensors(file)
        c = ModelConfig.from_metadata(
            file.metadata, vocab=take.rows("token_embd.weight"), source=str(file.path)
        )
        embd = take.matrix("token_embd.weight", c.vocab, c.hidden)
        output = embd
        if "output.weight" in file.tensors:
            output = take.matrix("output.weight", c.vocab, c.hidden)
        weights = cls(
            config=c,
            token_embd=embd,
            layers=tuple(_layer(take, c, f"blk.{i}.") for i in range(c.n_layers)),
            output_norm=take.vector("output_norm.weight", c.hidden),
            output=output,
        )
        take.nothing_else()
        return weights


def _layer(take: "_Tensors", c: ModelConfig, prefix: str) -> Layer:
    q_width, kv_width = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    stack = (c.n_experts,) if c.is_moe else ()
    suffix = "_exps.weight" if c.is_moe else ".weight"
    return Layer(
        attn_norm=take.vector(prefix + "attn_norm.weight", c.hidden),
        q=take.matrix(prefix + "attn_q.weight", q_width, c.hidden),
        k=take.matrix(prefix + "attn_k.weight", kv_width, c.hidden),
        v=take.matrix(prefix + "attn_v.weight", kv_width, c.hidden),
        q_norm=take.vector(prefix + "attn_q_norm.weight", c.head_dim),
        k_norm=take.vector(prefix + "attn_k_norm.weight", c.head_dim),
        attn_output=take.matrix(prefix + "attn_output.weight", c.hidden, q_width),
        ffn_norm=take.vector(prefix + "ffn_norm.weight", c.hidden),
        router=take.matrix(prefix + "ffn_gate_inp.weight", c.n_experts, c.hidden)
        if c.is_moe
        else None,
        gate=take.matrix(prefix + "ffn_gate" + suffix, *stack, c.ffn, c.hidden),
        up=take.matrix(prefix + "ffn_up" + suffix, *stack, c.ffn, c.hidden),
        down=take.matrix(prefix + "ffn_down" + suffix, *stack, c.hidden, c.ffn),
    )


class _Tensors:
    """Tensor look-ups by name and shape."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.taken: set[str] = set()

    def nothing_else(self) -> None:
        """Refuse a tensor that no role took, such as a bias: without it the model is another."""
        for name in self.file.tensors:
            if name not in self.taken:
                raise ModelRefused(
                    f"{self.file.path}: tensor {name!r}: expected only tensors of the "
                    "architecture, got one that is not implemented"
                )

    def rows(self, name: str) -> int:
        shape = self._find(name).shape
        if len(shape) != 2:
            raise ModelRefused(f"{self.file.path}: {name}: expected a matrix, got shape {shape}")
        return int(shape[0])

    def matrix(self, name: str, *shape: int) -> Weight:
        info = self._find(name)
        if info.shape != shape:
            raise ModelRefused(
                f"{self.file.path}: {name}: expected shape {shape}, got {info.shape}"
            )
        return Weight(name, info.format, info.shape, self.file.data(name))

    def vector(self, name: str, length: int) -> F32:
        return self.matrix(name, length).float32()

    def _find(self, name: str) -> TensorInfo:
        self.taken.add(name)
        try:
            return self.file.tensors[name]
        except KeyError:
            raise ModelRefused(
                f"{self.file.path}: tensor {name}: expected in the file, not found"
            ) from None
