"""What an architecture is in transformers, as data: config.json's keys, a checkpoint's tensors and
how they lie there. Architectures declare it; ``model.checkpoint`` reads folders by it, and
``verify.hf`` builds transformers' models by it.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Context, Decimal, localcontext
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from isobit.config import Metadata, ModelConfig
from isobit.gguf.header import Value
from isobit.numerics import RopeTable

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
class Pick:
    """Some entries of an axis, in that order."""

    entries: range | tuple[int, ...]
    axis: int = 0

    def __call__(self, a: Array, /) -> Array:
        """The tensor of those."""
        return np.take(a, self.entries, self.axis)


def transposed(a: Array, /) -> Array:
    """Matrices with rows and columns exchanged."""
    return a.swapaxes(-1, -2)


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


@dataclass(frozen=True)
class ModuleValue:
    """Where a stage's value passes in a layer of transformers' model: what a module gives, or is
    given. Most follow from the tensors (``verify.hf_modules``); others an architecture names."""

    module: str
    given: bool = False
    """Its input."""
    index: int = 0
    """Which, where it gives several."""
    moves: tuple[Reorder, ...] = ()
    """Columns brought into the graph's order."""


MIXTURE = {
    "moe_router": ModuleValue("mlp.gate", index=1),
    "moe_router_indices": ModuleValue("mlp.gate", index=2),
    "moe_ffn_out": ModuleValue("mlp.experts"),
    "ffn_with_shared": ModuleValue("mlp"),
}
"""Places of EXPERTS and SHARED_EXPERT."""
UNRANKED: dict[str, ModuleValue | None] = {
    **MIXTURE,
    "moe_router": None,
    "moe_router_indices": None,
}
"""The same where a token's experts come in no order."""

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


def usual(_c: ModelConfig, _names: Collection[str]) -> dict[str, Any]:
    """Settings of a class that has none of its own."""
    return {}


def head_size(c: Metadata) -> int:
    """Values of a head vector, from config.json."""
    heads = c.count("num_attention_heads", 1, 4096)
    return c.count("head_dim", 2, 512, default=c.count("hidden_size", 1, 1 << 20) // heads)


def neighbouring_pairs(c: Metadata) -> dict[str, Reorder]:
    """How rows of q and k come from transformers' order, the first value of all pairs of a head,
    then the second of all, to pair by pair."""
    heads, size = c.count("num_attention_heads", 1, 4096), head_size(c)
    kv_heads = c.count("num_key_value_heads", 1, 4096, default=heads)
    counts = {"attn_q": heads, "attn_k": kv_heads}
    return {role: Reorder((n, 2, size // 2), (0, 2, 1)) for role, n in counts.items()}


def rope_parameters(table: RopeTable, head_dim: int) -> dict[str, Any]:
    """RoPE in config.json's words. Divisors that differ are not among them."""
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": table.base}
    if table.size != head_dim:
        found["partial_rotary_factor"] = table.size / head_dim
    if table.factors and len(set(table.factors)) == 1:
        found |= {"rope_type": "linear", "factor": table.factors[0]}
    if y := table.yarn:
        found |= {
            "rope_type": "yarn",
            "factor": y.factor,
            "original_max_position_embeddings": y.original_context,
            "attention_factor": y.attention_factor * (1 + 0.1 * math.log(y.factor)),
            "beta_fast": y.fast,
            "beta_slow": y.slow,
            "truncate": True,
        }
    return found


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
    settings: Callable[[ModelConfig, Collection[str]], Mapping[str, Any] | None] | None = None
    """What transformers' configuration of a file's model has besides what all have, also from the
    names of its tensors; None of it: the model is of another class of transformers. None: nobody
    has said how that class is made of a file."""
    places: Callable[[Metadata], Mapping[str, ModuleValue | None]] = lambda _: MIXTURE
    """By stage, those that do not follow from the tensors, from config.json; None: it has none."""
    experts: str | None = "mlp.experts"
    """The module of a layer with stacked matrices of gate and up in one, and of down; None: they
    lie otherwise."""
    checkpoint: bool = True
    """Whether folders of it are read: ``keys``, ``only`` and ``more`` are there."""
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
