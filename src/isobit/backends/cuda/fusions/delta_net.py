"""A delta net of one token, between its input's products and its output's: convolution in the
launch of the former, the rule by one of its own, norm and gate in that of the latter."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from isobit.backends.cuda.lowering import Lowering
from isobit.backends.cuda.resident import RecurrentState
from isobit.model.graph import Op, Value
from isobit.numerics.ops import Columns, GatedDelta, Heads, L2Norm, RmsNorm

PATTERN = (
    "first = columns qkv",
    "convolved = causal_conv first",
    "channels = silu convolved",
    "q_heads = heads channels",
    "q = l2_norm q_heads",
    "k_heads = heads channels",
    "k = l2_norm k_heads",
    "v = heads channels",
    "beta_of = columns qkv",
    "beta = sigmoid beta_of",
    "alpha = columns qkv",
    "decay = decay alpha",
    "y = gated_delta q k v beta decay",
    "normed = rms_norm y",
    "gate = heads qkv",
    "gated = silu_gate gate normed",
    "taken = columns gated",
)
_COLUMNS = 32  # of decode_delta.cu
_WIDEST = 256


@dataclass(frozen=True)
class DeltaNet:
    """What the operations of PATTERN say, if they read the products' columns in this order: q and k
    of key heads, v of value heads, their gates, beta and alpha of each."""

    heads: int
    kv_heads: int
    """Key heads."""
    head_dim: int
    together: int
    taps: int
    eps: tuple[float, float]
    """Of the L2 norms, and of the norm of what the rule gives."""
    scales: tuple[float, float]
    """Of q and k."""
    weights: tuple[Callable[[], int], ...]
    """Of the convolution, the decay's dt and a, and the norm."""
    states: tuple[RecurrentState, RecurrentState]
    """Of the convolution and of the rule."""

    @classmethod
    def of(cls, g: Lowering, made: Mapping[str, Op], v: Mapping[str, Value]) -> "DeltaNet | None":
        """Of operations that match, by what they make; None if they are not so."""
        rule, q, k = made["y"], made["q"].operation, made["k"].operation
        norm, conv, decay = made["normed"], made["convolved"], made["decay"]
        assert isinstance(rule.operation, GatedDelta)
        assert isinstance(q, L2Norm)
        assert isinstance(k, L2Norm)
        assert isinstance(norm.operation, RmsNorm)
        (K, N), (V, columns) = v["k"].shape.row, v["v"].shape.row
        keys, values = K * N, V * N
        expected: list[tuple[str, Columns | Heads]] = [
            ("first", Columns(0, 2 * keys + values)),
            ("q_heads", Heads(0, K, N)),
            ("k_heads", Heads(keys, K, N)),
            ("v", Heads(2 * keys, V, N)),
            ("gate", Heads(2 * keys + values, V, N)),
            ("beta_of", Columns(2 * (keys + values), V)),
            ("alpha", Columns(2 * (keys + values) + V, V)),
            ("taken", Columns(0, values)),
        ]
        known = (
            all(made[name].operation == o for name, o in expected)
            and v["qkv"].shape.width == 2 * (keys + values + V)
            and columns == N
            and q.eps == k.eps
            and rule.operation.corrects
            and N % _COLUMNS == 0
            and N & (N - 1) == 0
            and N <= _WIDEST
        )
        if not known:
            return None
        return cls(
            V,
            K,
            N,
            rule.operation.together(K, V),
            conv.weights[0].shape[1],
            (q.eps, norm.operation.eps),
            (float(np.float32(q.scale)), float(np.float32(k.scale))),
            tuple(g.vector(w) for o in (conv, decay, norm) for w in o.weights),
            (g.state(conv), g.state(rule)),
        )

    @property
    def channels(self) -> int:
        """Columns of the convolution."""
        return (2 * self.kv_heads + self.heads) * self.head_dim

    @property
    def rest(self) -> int:
        """Columns of gates, beta and alpha."""
        return self.heads * (self.head_dim + 2)

    @property
    def defines(self) -> dict[str, str | int]:
        """The definitions that decode.cuh asks for."""
        return {"HEADS": self.heads, "KV_HEADS": self.kv_heads, "HEAD_DIM": self.head_dim}

    @property
    def blocks(self) -> int:
        """Of decode_delta.cu."""
        return self.heads * self.head_dim // _COLUMNS
