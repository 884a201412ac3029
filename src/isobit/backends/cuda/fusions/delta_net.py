"""A delta net between its input's products and its output's.

Of any tokens: one launch makes all that the rule reads, one keeps the convolution's last rows, then
come the rule, and norm and gate with the quantisation of what they give. Of one token the launches
of both products take what stands beside them, if they take the layer (decode_layer.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from isobit.backends.cuda.device.memory import supers
from isobit.backends.cuda.lowering import THREADS, WARPS, Claimed, Lowering
from isobit.backends.cuda.ops import gated_delta
from isobit.backends.cuda.resident import RecurrentState
from isobit.backends.cuda.workspace import BufferView, Pass
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
_INNER = {n for line in PATTERN for n in line.partition(" = ")[0].split()} - {"taken"}
_COLUMNS = 32  # of decode_delta.cu
_RUN = 8  # tokens of a warp of delta_inputs.cu
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


def claim(g: Lowering, ops: Sequence[Op]) -> Claimed | None:
    """See :mod:`isobit.backends.cuda.fusions`."""
    v = g.match(ops, PATTERN, _INNER)
    if v is None or not g.only_multiplied(v["taken"]) or v["taken"].shape.width % 256:
        return None
    made = {name: op for op in ops[: len(PATTERN)] for name in v if v[name] in op.outputs}
    net = DeltaNet.of(g, made, v)
    return None if net is None else (len(PATTERN), partial(_lower, g, net, made["y"], v))


def _lower(g: Lowering, net: DeltaNet, rule: Op, v: Mapping[str, Value]) -> None:
    products, width = g.dense(v["qkv"]), net.channels + 2 * net.heads
    inputs, keys = g.slot("delta_inputs", width), net.kv_heads * net.head_dim
    taps, dt, a, norm = net.weights
    starts = ("q", 0), ("k", keys), ("v", 2 * keys)
    for name, at in (*starts, ("beta", net.channels), ("decay", net.channels + net.heads)):
        g.put(v[name], BufferView(inputs, width, v[name].shape.row[-1], at))

    def make(p: Pass) -> None:
        sequences = p.inputs.chunks, p.inputs.positions, net.states[0].address
        grid = -(-p.tokens // _RUN), -(-(net.channels // net.head_dim + 1) // WARPS)
        g.launch(
            "fusions/delta_inputs",
            grid,
            (products.address, taps(), dt(), a(), net.eps[0], *net.scales, *sequences)
            + (p.sequences, p.tokens, inputs.address),
            net.defines | {"TAPS": net.taps},
        )
        g.launch(
            "fusions/delta_inputs.keep_rows",
            (-(-net.channels // THREADS), p.sequences),
            (products.address, *sequences),
            net.defines | {"TAPS": net.taps},
        )

    g.emit(make, *(v[name] for name in ("q", "k", "beta", "decay")))
    gated_delta.lower(g, rule)
    y, taken = g.dense(v["y"]), v["taken"]
    n = taken.shape.width
    acts = g.acts_of(taken, n)

    def finish(p: Pass) -> None:
        gate, count = products.address + 4 * net.channels, p.tokens * supers(n)
        g.launch(
            "fusions/delta_output",
            (-(-count // WARPS),),
            (y.address, gate, products.stride, norm(), net.eps[1], supers(n), count, acts.address),
            {"HEAD_DIM": net.head_dim},
        )

    g.emit(finish)
