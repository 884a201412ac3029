"""What architectures have in common: parts of a layer, written with a builder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isobit.config import ModelConfig
from isobit.gguf.formats import F32
from isobit.model.architectures.routing import Routing
from isobit.model.graph import Builder, Graph, Value
from isobit.model.tensors import Tensors
from isobit.numerics import RopeTable, Weight
from isobit.numerics.ops import (
    Add,
    Append,
    Attention,
    AttentionScores,
    AttentionSoftmax,
    Bias,
    Combine,
    Embedding,
    ExpertMatMul,
    ExpertScale,
    GatedAdd,
    Heads,
    MatMul,
    RmsNorm,
    Rope,
    Scale,
    SelectRows,
    Sigmoid,
    SiluGate,
    Softcap,
    TopK,
)


@dataclass(frozen=True)
class LayerBuilder:
    """A layer being written: its builder, and its tensors, whose names begin with ``at``."""

    g: Builder
    tensors: Tensors
    at: str

    def take(self, role: str, *shape: int) -> Weight:
        """A tensor of the layer."""
        return self.tensors.take(self.at + role, *shape)

    def split(self, whole: str, *parts: tuple[str, int]) -> None:
        """What a file may have as one matrix, and one bias, is taken as several (role, rows)."""
        for tail in (".weight", ".bias"):
            of = [(f"{self.at}{role}{tail}", rows) for role, rows in parts]
            self.tensors.split(f"{self.at}{whole}{tail}", of)

    def matrix(self, role: str, *shape: int) -> Weight:
        """A weight of the layer. What a file of NVFP4 says of its input's range beside it is for
        engines that bring activations to 4 bits."""
        self.tensors.leave_out(f"{self.at}{role}.input_scale")
        return self.take(f"{role}.weight", *shape)

    def norm(self, name: str, role: str, eps: float, x: Value) -> Value:
        """RMS norm of rows."""
        weight = self.take(f"{role}.weight", x.shape.width)
        return self.g.one(name, RmsNorm(eps), x, weights=[weight])

    def product(self, name: str | None, x: Value, *matrices: tuple[str, int]) -> Value:
        """x times matrices (role, rows), the products side by side, each times its scale where the
        file has one."""
        weights = [self.matrix(role, rows, x.shape.width) for role, rows in matrices]
        scale = self._by_column("scale", matrices, (1,), 1)
        y = self.g.one(name if scale is None else None, MatMul(), x, weights=weights)
        return y if scale is None else self.g.one(name, Scale(), y, weights=[scale])

    def biased(
        self, name: str, x: Value, *matrices: tuple[str, int], always: bool = False
    ) -> Value:
        """:meth:`product`, each followed by its bias where the file has one. ``always``: a file
        without it is not whole."""
        for role, rows in matrices if always else ():
            self.take(f"{role}.bias", rows)
        bias = self._by_column("bias", matrices, None, 0)
        y = self.product(name if bias is None else None, x, *matrices)
        return y if bias is None else self.g.one(name, Bias(), y, weights=[bias])

    def expert_product(
        self, name: str | None, x: Value, ids: Value, role: str, *shape: int
    ) -> Value:
        """x through the chosen ones of a stack of matrices [experts, rows, columns], each times its
        scale where the file has them."""
        weight = self.matrix(role, *shape)
        if f"{self.at}{role}.scale" not in self.tensors:
            return self.g.one(name, ExpertMatMul(), x, ids, weights=[weight])
        scale = self.take(f"{role}.scale", shape[0])
        y = self.g.one(None, ExpertMatMul(), x, ids, weights=[weight])
        return self.g.one(name, ExpertScale(), y, ids, weights=[scale])

    def _by_column(
        self,
        of: str,
        matrices: tuple[tuple[str, int], ...],
        shape: tuple[int, ...] | None,
        absent: float,
    ) -> Weight | None:
        """The vector, or number, that the file has beside each matrix, for each column of their
        products; None if it has none of them. ``shape``: its own, if not the matrix's rows."""
        has = [f"{self.at}{role}.{of}" in self.tensors for role, _ in matrices]
        if not any(has):
            return None
        together = np.concatenate(
            [
                np.broadcast_to(
                    self.take(f"{role}.{of}", *(shape or (rows,))).float32() if there else absent,
                    rows,
                ).astype(np.float32)
                for (role, rows), there in zip(matrices, has, strict=True)
            ]
        )
        name = f"{self.at}{'+'.join(role for role, _ in matrices)}.{of}"
        return vector(name, together)


def transformer(
    c: ModelConfig,
    tensors: Tensors,
    attention: "Mixer",
    feed_forward: "Mixer",
    *,
    ffn_norm: str = "ffn_norm",
    scale: float = 1.0,
    logit_scale: float = 1.0,
) -> Graph:
    """A model whose layers add attention, then a feed-forward, each of a norm, to what they are
    given. Both get a layer's part and number. ``ffn_norm``: the role of the second norm; ``scale``
    is the embedding's, by ``logit_scale`` logits are divided."""
    g = Builder(tensors.source)
    x = embedding(g, c, tensors, scale)
    for i in range(c.n_layers):
        with g.layer(i):
            p = LayerBuilder(g, tensors, f"blk.{i}.")
            x = layer(p, i, c, x, attention, feed_forward, ffn_norm=ffn_norm)
    return head(g, c, tensors, x, logit_scale)


Mixer = Callable[[LayerBuilder, int, Value], Value]


def layer(
    p: LayerBuilder,
    number: int,
    c: ModelConfig,
    x: Value,
    attention: Mixer,
    feed_forward: Mixer,
    *,
    ffn_norm: str = "ffn_norm",
) -> Value:
    """One of the layers that :func:`transformer` speaks of."""
    h = p.norm("attn_norm", "attn_norm", c.eps, x)
    x = p.g.one("post_attn_residual", Add(), x, attention(p, number, h))
    h = p.norm("ffn_norm", ffn_norm, c.eps, x)
    return p.g.one("post_ffn_residual", Add(), x, feed_forward(p, number, h))


def embedding(g: Builder, c: ModelConfig, tensors: Tensors, scale: float = 1.0) -> Value:
    """The tokens' rows of the table, times a number."""
    table = tensors.take("token_embd.weight", c.vocab, c.hidden)
    x = g.one("embedding" if scale == 1 else None, Embedding(), g.tokens, weights=[table])
    return scaled(g, "embedding", x, scale)


def scaled(g: Builder, name: str | None, x: Value, number: float) -> Value:
    """Rows times a number of the model, unless it is 1."""
    if number == 1:
        return x
    (width,) = x.shape.row
    return g.one(
        name, Scale(), x, weights=[vector(f"{number!r} x {width}", np.full(width, number))]
    )


def vector(name: str, values: NDArray[np.floating]) -> Weight:
    """A weight in float32 of values that no tensor holds as they are."""
    return Weight(name, F32, values.shape, values.astype(np.float32).reshape(-1).view(np.uint8))


def head(
    g: Builder,
    c: ModelConfig,
    tensors: Tensors,
    x: Value,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
) -> Graph:
    """The last norm and the logits of the wanted rows, which end the graph. The embedding table is
    the output matrix of a file without one. The norm's weights are divided by what logits are.
    ``softcap`` of the logits, 0: none."""
    norm = tensors.take("output_norm.weight", c.hidden)
    if logit_scale != 1:
        norm = vector(norm.name, norm.float32() / np.float32(logit_scale))
    x = g.one("final_norm", RmsNorm(c.eps), x, weights=[norm])
    name = "output.weight" if "output.weight" in tensors else "token_embd.weight"
    wanted = g.one(None, SelectRows(), x, g.logit_rows)
    matrix = tensors.take(name, c.vocab, c.hidden)
    y = g.one(None if softcap else "lm_head", MatMul(), wanted, weights=[matrix])
    return g.graph(g.one("lm_head", Softcap(softcap), y) if softcap else y)


def heads_of(p: LayerBuilder, name: str, rope: Rope, of: Value, heads: Heads) -> Value:
    """Head vectors of a product, rotated."""
    return p.g.one(name, rope, p.g.one(None, heads, of), p.g.positions)


def rotated_heads(
    p: LayerBuilder, name: str, norm: str, eps: float, table: RopeTable, of: Value, heads: Heads
) -> Value:
    """Head vectors of a product, each normed, then rotated."""
    weight = p.take(f"{norm}.weight", heads.size)
    normed = p.g.one(None, RmsNorm(eps), p.g.one(None, heads, of), weights=[weight])
    return p.g.one(name, Rope(table), normed, p.g.positions)


def attention(
    g: Builder,
    q: Value,
    k: Value,
    v: Value,
    *,
    window: int | None = None,
    sinks: Sequence[Weight] = (),
    scale: float | None = None,
) -> Value:
    """Attention over what the sequence has appended, or over its last ``window`` tokens; scores
    times ``scale``."""
    keys, values = g.add(None, Append(), k, v)
    how, softmax = AttentionScores(window, scale), AttentionSoftmax(window)
    scores = g.one("attn_scores", how, q, keys, g.positions, on_request=True)
    g.one("attn_softmax", softmax, scores, g.positions, weights=sinks, on_request=True)
    attends = Attention(window, scale)
    return g.one("attention", attends, q, keys, values, g.positions, weights=sinks)


def feed_forward(p: LayerBuilder, c: ModelConfig, h: Value) -> Value:
    """A mixture of SwiGLU experts, or SwiGLU of a dense model."""
    return experts(p, c, h) if c.is_moe else dense(p, "ffn", "", c.ffn, h)


def dense(p: LayerBuilder, name: str, tail: str, width: int, h: Value) -> Value:
    """SwiGLU of that width; ``tail``: what the roles of its tensors end in."""
    gate = p.product(f"{name}_gate", h, (f"ffn_gate{tail}", width))
    up = p.product(f"{name}_up", h, (f"ffn_up{tail}", width))
    together = p.g.one(f"{name}_swiglu", SiluGate(), gate, up)
    return p.product(f"{name}_out", together, (f"ffn_down{tail}", h.shape.width))


def experts(
    p: LayerBuilder, c: ModelConfig, h: Value, how: Routing | None = None, *, biased: bool = False
) -> Value:
    """A mixture of SwiGLU experts, chosen by ``how``, by default their softmax; ``biased``: by
    probabilities with a bias."""
    how = how or Routing()
    weights, ids = route(p, c, h, how, biased=biased)
    gate, up = expert_gate_up(p, c, h, ids)
    y = p.g.one("moe_expert_swiglu", SiluGate(), gate, up)
    y = p.expert_product("moe_expert_out", y, ids, "ffn_down_exps", c.n_experts, c.hidden, c.ffn)
    y = p.g.one("moe_ffn_out", Combine(), weights, y)
    return scaled(p.g, "moe_ffn_scaled", y, how.scale)


def route(
    p: LayerBuilder, c: ModelConfig, h: Value, how: Routing, *, biased: bool = False
) -> tuple[Value, ...]:
    """The weights and the ids of the experts that are chosen."""
    z = p.product("moe_router_logits", h, ("ffn_gate_inp", c.n_experts))
    if how.sigmoid:
        z = p.g.one("moe_router_scores", Sigmoid(), z)
    names = "moe_router", "moe_router_indices"
    bias = [p.take("exp_probs_b.bias", c.n_experts)] if biased else []
    choice = TopK(
        c.n_experts_used, c.normalise_experts, not how.sigmoid, how.groups, how.groups_used
    )
    return p.g.add(names, choice, z, weights=bias)


def expert_gate_up(p: LayerBuilder, c: ModelConfig, h: Value, ids: Value) -> tuple[Value, Value]:
    """Both products of the chosen experts with their input."""

    def product(role: str, rows: int) -> Value:
        shape = (c.n_experts, rows, h.shape.row[-1])
        return p.expert_product(f"moe_expert_{role}", h, ids, f"ffn_{role}_exps", *shape)

    if f"{p.at}ffn_gate_up_exps.weight" in p.tensors:  # both in one tensor, the gate's rows first
        both, k, n = product("gate_up", 2 * c.ffn), c.n_experts_used, c.ffn
        gate, up = (p.g.one(None, Heads(at, k, n, 2 * n), both) for at in (0, n))
        return gate, up
    return product("gate", c.ffn), product("up", c.ffn)


def shared_expert(p: LayerBuilder, width: int, h: Value, routed: Value) -> Value:
    """An expert that every token goes to, scaled by the sigmoid of its gate, added to the others'
    sum."""
    shared = dense(p, "shared_expert", "_shexp", width, h)
    weight = p.take("ffn_gate_inp_shexp.weight", h.shape.width).as_row()
    gate = p.g.one("shared_expert_weight", MatMul(), h, weights=[weight])
    return p.g.one("ffn_with_shared", GatedAdd(), routed, shared, gate)
