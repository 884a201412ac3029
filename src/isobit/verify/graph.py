"""The forward pass stage by stage: what each stage is computed from, in any arithmetic.

This is what tells a faulty operation from an error it was handed: a stage can be recomputed on its
own from recorded inputs. The same graph in float64 is the oracle, and with single stages exchanged
it is an ablation.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from isobit.backends.base import I32, Tap
from isobit.config import ModelConfig
from isobit.errors import FileRefused
from isobit.model.stages import EMBEDDING, FINAL_STAGES, ON_REQUEST, layer_stages
from isobit.model.weights import Layer, Weights
from isobit.numerics import Weight
from isobit.verify.arithmetic import Arithmetic, Array

Compute = Callable[["Run", str, int | None, Sequence[Array]], Array]


def shaped(config: ModelConfig, stage: str, layer: int | None, value: Array) -> Array:
    """A recorded value [T, …] in its stage's shape: some files say none.

    Raises FileRefused for one that does not fit the model.
    """
    c, k = config, config.n_experts_used
    rows: dict[str, tuple[int, ...]] = {
        "qkv_matmul": ((c.n_heads + 2 * c.n_kv_heads) * c.head_dim,),
        "q_post_rope": (c.n_heads, c.head_dim),
        "k_post_rope": (c.n_kv_heads, c.head_dim),
        "attn_scores": (c.n_heads, -1),
        "attn_softmax": (c.n_heads, -1),
        "attention": (c.n_heads * c.head_dim,),
        "moe_router_logits": (c.n_experts,),
        "moe_router": (k,),
        "moe_router_indices": (k,),
        "moe_expert_out": (k, c.hidden),
        "lm_head": (c.vocab,),
    }
    rows |= dict.fromkeys(("moe_expert_gate", "moe_expert_up", "moe_expert_swiglu"), (k, c.ffn))
    rows |= dict.fromkeys(("ffn_gate", "ffn_up", "ffn_swiglu"), (c.ffn,))
    row = rows.get(stage, (c.hidden,))
    where = stage if layer is None else f"{stage} of layer {layer}"
    if layer is not None and (layer >= c.n_layers or stage not in layer_stages(moe=c.is_moe)):
        raise FileRefused(f"{where}: expected a stage of the model's {c.n_layers} layers")
    row = rows.get(stage, (c.hidden,))
    try:
        return value.reshape(len(value), *row)
    except ValueError:
        raise FileRefused(
            f"{where}: expected shape {row} for each token, got {value.shape[1:]}; is the trace "
            "of this model?"
        ) from None


class Run:
    """One run's values as they come, stage by stage: the inputs of the next stages.

    Holds one layer's stages, and the keys and values of every layer (a later chunk needs them).
    """

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.config = weights.config
        self._layer: int | None = None
        self._values: dict[str, Array] = {}
        self._residual: tuple[int, Array] = (-1, np.empty(0))
        self._keys: dict[int, list[Array]] = {}
        self._v: dict[int, list[Array]] = {}

    def start(self, tokens: I32, positions: I32) -> None:
        """A chunk begins."""
        self.tokens, self.positions = tokens, positions

    def put(self, stage: str, layer: int | None, value: Array) -> None:
        """A stage's value is known; stages come in graph order."""
        c = self.config
        if layer != self._layer:
            self._layer, self._values = layer, {}
        self._values[stage] = value
        if stage in (EMBEDDING, "post_ffn_residual"):
            self._residual = (0 if layer is None else layer + 1, value)
        elif layer is not None and stage == "qkv_matmul":
            v = value.reshape(len(value), -1, c.head_dim)[:, c.n_heads + c.n_kv_heads :]
            self._v.setdefault(layer, []).append(v)
        elif layer is not None and stage == "k_post_rope":
            self._keys.setdefault(layer, []).append(value)
        elif stage in ("moe_ffn_out", "ffn_out"):
            self._values["ffn_output"] = value

    def value(self, stage: str) -> Array:
        """A stage's value in the layer that runs."""
        return self._values[stage]

    def inputs(self, stage: str, layer: int | None) -> list[Array] | None:
        """What a stage is computed from, in order; None if something was not put."""
        found = dict(self._values) if layer == self._layer else {}
        if self._residual[0] == (self.config.n_layers if layer is None else layer):
            found["residual"] = self._residual[1]
        if layer is not None:
            for name, parts in (("keys", self._keys), ("values", self._v)):
                held = parts.get(layer, [])
                if sum(map(len, held)) == self.positions[-1] + 1:  # of every token so far
                    found[name] = np.concatenate(held)
        names = OPERATIONS[stage].inputs
        return [found[n] for n in names] if all(n in found for n in names) else None

    def compute(
        self, stage: str, layer: int | None, inputs: Sequence[Array], a: Arithmetic
    ) -> Array:
        """A stage's value from its inputs, in an arithmetic."""
        place = Place(a, self.weights, layer or 0, self.tokens, self.positions)
        return OPERATIONS[stage].compute(place, *inputs)


@dataclass(frozen=True)
class Place:
    """Where an operation stands: what it needs besides its inputs."""

    a: Arithmetic
    weights: Weights
    index: int
    tokens: I32
    positions: I32

    @property
    def c(self) -> ModelConfig:
        """The model's configuration."""
        return self.weights.config

    @property
    def layer(self) -> Layer:
        """The layer's weights."""
        return self.weights.layers[self.index]

    def heads(self, x: Array) -> Array:
        """x [T, heads * head_dim] as [T, heads, head_dim]."""
        return x.reshape(len(x), -1, self.c.head_dim)

    def qkv(self, h: Array) -> Array:
        """q, k and v side by side."""
        w = self.layer
        return np.concatenate([self.a.matmul(m, h) for m in (w.q, w.k, w.v)], axis=1)

    def turned(self, x: Array, norm: Array) -> Array:
        """Head norm, then RoPE."""
        return self.a.rope(self.a.rms_norm(x, norm), self.positions)

    def attention(self, q: Array, keys: Array, values: Array) -> Array:
        """Attention, heads side by side."""
        out = self.a.attention(q, keys, values, self.positions)
        return out.reshape(len(out), -1)

    def top_k(self, logits: Array) -> tuple[I32, Array]:
        """Experts and their weights."""
        c = self.c
        return self.a.top_k(logits, c.n_experts_used, normalise=c.normalise_experts)

    def experts(self, stack: Weight, x: Array, ids: Array) -> Array:
        """x [T, K] or [T, k, K] through each token's experts: [T, k, N]."""
        chosen = np.unique(ids).tolist()
        if chosen[0] < 0 or chosen[-1] >= self.c.n_experts:  # a recorded trace may say anything
            raise FileRefused(
                f"moe_router_indices of layer {self.index}: expected experts 0 to "
                f"{self.c.n_experts - 1}, got {chosen[0]} to {chosen[-1]}"
            )
        out: Array = np.empty(0)
        for e in chosen:
            at = np.nonzero(ids == e)
            y = self.a.matmul(stack.expert(e), x[at[0]] if x.ndim == 2 else x[at])
            out = out if out.size else np.empty((*ids.shape, y.shape[1]), y.dtype)
            out[at] = y
        return out


class Operation(NamedTuple):
    """How a stage is computed: ``compute(place, *inputs)``.

    Inputs are stages, or "residual", the layer's input; "keys" and "values", all k_post_rope and v
    up to here; "ffn_output", moe_ffn_out or ffn_out.
    """

    inputs: tuple[str, ...]
    compute: Callable[..., Array]


def _k_part(p: Place, qkv: Array) -> Array:
    c = p.c
    return p.turned(p.heads(qkv)[:, c.n_heads : c.n_heads + c.n_kv_heads], p.layer.k_norm)


def _op(compute: Callable[..., Array], *inputs: str) -> Operation:
    return Operation(inputs, compute)


_IDS = "moe_router_indices"
OPERATIONS: dict[str, Operation] = {
    "embedding": _op(lambda p: p.a.embedding(p.weights.token_embd, p.tokens)),
    "attn_norm": _op(lambda p, x: p.a.rms_norm(x, p.layer.attn_norm), "residual"),
    "qkv_matmul": _op(Place.qkv, "attn_norm"),
    "q_post_rope": _op(
        lambda p, x: p.turned(p.heads(x)[:, : p.c.n_heads], p.layer.q_norm), "qkv_matmul"
    ),
    "k_post_rope": _op(_k_part, "qkv_matmul"),
    "attn_scores": _op(lambda p, q, k: p.a.scores(q, k, p.positions), "q_post_rope", "keys"),
    "attn_softmax": _op(lambda p, s: p.a.softmax(s, p.positions), "attn_scores"),
    "attention": _op(Place.attention, "q_post_rope", "keys", "values"),
    "attn_out": _op(lambda p, x: p.a.matmul(p.layer.attn_output, x), "attention"),
    "post_attn_residual": _op(lambda p, x, y: p.a.add(x, y), "residual", "attn_out"),
    "ffn_norm": _op(lambda p, x: p.a.rms_norm(x, p.layer.ffn_norm), "post_attn_residual"),
    "moe_router_logits": _op(lambda p, h: p.a.matmul(p.layer.router, h), "ffn_norm"),
    "moe_router": _op(lambda p, z: p.top_k(z)[1], "moe_router_logits"),
    "moe_router_indices": _op(lambda p, z: p.top_k(z)[0], "moe_router_logits"),
    "moe_expert_gate": _op(lambda p, h, i: p.experts(p.layer.gate, h, i), "ffn_norm", _IDS),
    "moe_expert_up": _op(lambda p, h, i: p.experts(p.layer.up, h, i), "ffn_norm", _IDS),
    "moe_expert_swiglu": _op(
        lambda p, g, u: p.a.silu_gate(g, u), "moe_expert_gate", "moe_expert_up"
    ),
    "moe_expert_out": _op(lambda p, x, i: p.experts(p.layer.down, x, i), "moe_expert_swiglu", _IDS),
    "moe_ffn_out": _op(lambda p, w, y: p.a.combine(w, y), "moe_router", "moe_expert_out"),
    "ffn_gate": _op(lambda p, h: p.a.matmul(p.layer.gate, h), "ffn_norm"),
    "ffn_up": _op(lambda p, h: p.a.matmul(p.layer.up, h), "ffn_norm"),
    "ffn_swiglu": _op(lambda p, g, u: p.a.silu_gate(g, u), "ffn_gate", "ffn_up"),
    "ffn_out": _op(lambda p, x: p.a.matmul(p.layer.down, x), "ffn_swiglu"),
    "post_ffn_residual": _op(lambda p, x, y: p.a.add(x, y), "post_attn_residual", "ffn_output"),
    "final_norm": _op(lambda p, x: p.a.rms_norm(x, p.weights.output_norm), "residual"),
    "lm_head": _op(lambda p, x: p.a.matmul(p.weights.output, x), "final_norm"),
}


def order(config: ModelConfig) -> Iterator[tuple[str, int | None]]:
    """Every (stage, layer) in graph order."""
    yield EMBEDDING, None
    for layer in range(config.n_layers):
        for stage in layer_stages(moe=config.is_moe):
            yield stage, layer
    for stage in FINAL_STAGES:
        yield stage, None


@np.errstate(all="ignore")  # damaged weights overflow
def forward(
    run: Run,
    tokens: I32,
    positions: I32,
    compute: Compute,
    tap: Tap | None = None,
    stages: frozenset[str] | None = None,
) -> Array:
    """Run a sequence's next tokens, each stage by ``compute``; logits of every token."""
    run.start(tokens, positions)
    value: Array = np.empty(0)
    maps = stages is not None and not ON_REQUEST.isdisjoint(stages)
    for stage, layer in order(run.config):
        if stage in ON_REQUEST and not maps:
            continue
        inputs = run.inputs(stage, layer)
        assert inputs is not None
        value = compute(run, stage, layer, inputs)
        run.put(stage, layer, value)
        if tap is not None and (stages is None or stage in stages):
            tap(stage, layer, value)
    return value
