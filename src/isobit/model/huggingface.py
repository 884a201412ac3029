"""What an architecture is in transformers, as data: config.json's keys, a checkpoint's tensors and
how they lie there. Architectures declare it; ``model.checkpoint`` reads folders by it, and
``verify.hf`` builds transformers' models by it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Context, Decimal, localcontext
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from isobit.config import Metadata
from isobit.gguf.header import Value

Array = NDArray[Any]


class Move(Protocol):
    """A rearrangement of a tensor's numbers, from transformers' layout to GGUF's.

    Raises ValueError or IndexError for a shape that it cannot be of; or leaves it as it is.
    """

    def __call__(self, a: Array, /) -> Array:
        """The tensor rearranged."""
        ...


@dataclass(frozen=True)
class Reorder:
    """Entries of an axis counted by several indices, brought into another order of those.

    ``counts``: how far each index goes, the slowest first; ``order``: the place that each had.
    The entries before ``first`` stay.
    """

    counts: tuple[int, ...]
    order: tuple[int, ...]
    axis: int = 0
    first: int = 0

    def __call__(self, a: Array, /) -> Array:
        """The tensor rearranged."""
        n = math.prod(self.counts)
        if a.shape[self.axis] != self.first + n:
            return a  # of another shape than it should have, which is refused by its shape
        moved = np.arange(n).reshape(self.counts).transpose(self.order).reshape(-1)
        return np.take(a, np.concatenate([np.arange(self.first), self.first + moved]), self.axis)


@dataclass(frozen=True)
class Share:
    """One of ``of`` equal shares of an axis."""

    index: int
    of: int
    axis: int = -2

    def __call__(self, a: Array, /) -> Array:
        """The share."""
        n = a.shape[self.axis] // self.of
        at = [slice(None)] * a.ndim
        at[self.axis] = slice(self.index * n, (self.index + 1) * n)
        return a[tuple(at)]


@dataclass(frozen=True)
class Drop:
    """An axis of one entry left out."""

    axis: int

    def __call__(self, a: Array, /) -> Array:
        """The tensor without it."""
        return a.squeeze(self.axis)


@dataclass(frozen=True)
class Change:
    """What becomes of each number of a float32 tensor, and back."""

    there: Callable[[Array], Array]
    back: Callable[[Array], Array]


def _minus_exp(a: Array) -> Array:
    """Correctly rounded to binary64, then to binary32: libraries of functions differ in the last
    bit."""
    with localcontext(Context(prec=40, traps=[])):
        values = [-float(Decimal(x).exp()) for x in a.reshape(-1).tolist()]
    return np.array(values, np.float64).astype(np.float32).reshape(a.shape)


ADD_ONE = Change(lambda w: w + 1, lambda w: w - 1)
MINUS_EXP = Change(_minus_exp, lambda a: np.log(-a))


@dataclass(frozen=True)
class Source:
    """Where a tensor comes from. ``name`` may hold ``{e}``: then one an expert, to be stacked."""

    name: str
    moves: tuple[Move, ...] = ()
    float32: bool = False
    """Whether it is kept in float32, whatever matrices become; vectors always are."""
    change: Change | None = None
    """Of a tensor kept in float32."""

    def moved(self, a: Array) -> Array:
        """The tensor in GGUF's layout; raises ValueError or IndexError for an unfit shape."""
        for move in self.moves:
            a = move(a)
        return a


Sources = Mapping[str, Source | Sequence[Source]]
"""By a tensor's name in GGUF: where it may come from, the first that is there."""


def weights(**names: str) -> dict[str, Source]:
    """``role=name`` of weights that lie as in GGUF."""
    return {f"{role}.weight": Source(f"{name}.weight") for role, name in names.items()}


ATTENTION = weights(
    attn_norm="input_layernorm",
    attn_q="self_attn.q_proj",
    attn_k="self_attn.k_proj",
    attn_v="self_attn.v_proj",
    attn_output="self_attn.o_proj",
)
BIASES = {
    f"attn_{role}.bias": Source(f"self_attn.{name}.bias")
    for role, name in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("output", "o_proj"))
}
FEED_FORWARD = weights(ffn_gate="mlp.gate_proj", ffn_up="mlp.up_proj", ffn_down="mlp.down_proj")
EXPERTS: Sources = {
    "ffn_gate_inp.weight": Source("mlp.gate.weight", float32=True),
    "ffn_gate_exps.weight": (
        Source("mlp.experts.{e}.gate_proj.weight"),
        Source("mlp.experts.gate_up_proj", (Share(0, 2),)),
    ),
    "ffn_up_exps.weight": (
        Source("mlp.experts.{e}.up_proj.weight"),
        Source("mlp.experts.gate_up_proj", (Share(1, 2),)),
    ),
    "ffn_down_exps.weight": (
        Source("mlp.experts.{e}.down_proj.weight"),
        Source("mlp.experts.down_proj"),
    ),
}
"""A matrix each, or stacked, gate and up in one."""
SHARED_EXPERT: Sources = {
    **weights(
        ffn_gate_shexp="mlp.shared_expert.gate_proj",
        ffn_up_shexp="mlp.shared_expert.up_proj",
        ffn_down_shexp="mlp.shared_expert.down_proj",
    ),
    "ffn_gate_inp_shexp.weight": Source("mlp.shared_expert_gate.weight", (Drop(0),)),
}

KEYS: dict[str, str] = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
EXPERT_KEYS: dict[str, str] = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
DENSE_KEYS: dict[str, str] = {"feed_forward_length": "intermediate_size"}
ONLY: dict[str, object] = {
    "hidden_act": "silu",
    "rope_type": "default",
    "use_sliding_window": False,
}


OUTSIDE: Sources = weights(
    token_embd="model.embed_tokens", output_norm="model.norm", output="lm_head"
)


def _nothing(_: Metadata) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class HuggingFace:
    """An architecture in transformers' words."""

    architecture: str
    """As ``general.architecture`` has it."""
    model: str
    """transformers' class."""
    keys: Mapping[str, str]
    """The key in config.json of what follows ``general.architecture`` in GGUF."""
    layer: Callable[[Metadata], Sources]
    """From config.json to what a layer may have, by names without ``blk.{i}.`` and
    ``model.layers.{i}.``. What a layer must have, the graph knows."""
    outside: Sources = field(default_factory=lambda: OUTSIDE)
    """What a model has outside its layers."""
    only: Mapping[str, object] = field(default_factory=lambda: ONLY)
    """The one value of a key that is implemented, which its absence means, too."""
    more: Callable[[Metadata], dict[str, Value]] = _nothing
    """What no one key of config.json says; raises ModelRefused."""
    computed: Callable[[Metadata], Mapping[str, NDArray[np.float32]]] = _nothing
    """Tensors of the file, by name, that no checkpoint has; raises ModelRefused."""
    drafts: str | None = None
    """The key in config.json of how many blocks behind the layers draft tokens; they are left
    out."""

    def metadata(self, c: Metadata) -> dict[str, Value]:
        """What follows ``general.architecture``, from config.json. Raises ModelRefused."""
        for key, value in self.only.items():
            c.only(key, value)
        known = {ours: c.scalar(name) for ours, name in self.keys.items() if name in c.metadata}
        return {**known, **self.more(c)}

    def left_out(self, c: Metadata) -> tuple[str, ...]:
        """What the names of tensors begin with that no token depends on. Raises ModelRefused."""
        layers = c.count("num_hidden_layers", 1, 4096)
        drafts = c.count(self.drafts, 0, 64, default=0) if self.drafts else 0
        return tuple(f"model.layers.{i}." for i in range(layers, layers + drafts))

    def sources(self, c: Metadata) -> dict[str, tuple[Source, ...]]:
        """Where every tensor may come from, by its name in GGUF. Raises ModelRefused."""
        found = dict(self.outside)
        if c.flag("tie_word_embeddings", default=False):
            found.pop("output.weight", None)
        layer = self.layer(c)
        for i in range(c.count("num_hidden_layers", 1, 4096)):
            for role, given in layer.items():
                found[f"blk.{i}.{role}"] = [
                    replace(s, name=f"model.layers.{i}.{s.name}") for s in each(given)
                ]
        return {name: each(given) for name, given in found.items()}


def each(given: Source | Sequence[Source]) -> tuple[Source, ...]:
    """Where a tensor may come from."""
    return (given,) if isinstance(given, Source) else tuple(given)
