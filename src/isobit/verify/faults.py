"""The reference with a planted fault: a comparison that does not notice it is worth nothing."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import dropwhile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isobit.backends.base import Backend
from isobit.backends.reference import ReferenceBackend
from isobit.backends.reference.backend import Compute, Hook
from isobit.config import EngineConfig
from isobit.errors import UsageError
from isobit.model.graph import Graph, Key, Op
from isobit.model.weights import Weights
from isobit.numerics.ops import Array, Arrays, Context
from isobit.runtime.model import Model
from isobit.verify.graph_faults import GRAPH_FAULTS, partner, rewritten

Change = Callable[[NDArray[Any]], None]
"""Changes an array in place."""
Make = Callable[[Weights, EngineConfig], Backend]


class ChangedStage(ReferenceBackend):
    """Changes the value of one stage of one layer, so that all that follows is computed from it."""

    def __init__(
        self, weights: Weights, engine: EngineConfig, stage: str, layer: int | None, change: Change
    ) -> None:
        if (stage, layer) not in weights.graph.stages:
            raise UsageError(f"fault: expected a model with {stage} in layer {layer}, it has none")
        value = weights.graph.stages[stage, layer].value

        def hook(op: Op, inputs: Sequence[Array], compute: Compute) -> Arrays:
            made = compute(op, inputs)
            if value in op.outputs:
                change(made[op.outputs.index(value)])
            return made

        super().__init__(weights, engine, hook)


class OneLayer(ReferenceBackend):
    """Runs some of one layer's operations in another way."""

    def __init__(self, weights: Weights, engine: EngineConfig, layer: int, fault: str) -> None:
        if fault == "reordered-sum" and weights.config.n_experts_used < 3:
            raise UsageError("reordered-sum: expected a sum of 3 experts or more")
        self._layer, (self._kind, self._wrong) = layer, _WRONG[fault]
        super().__init__(weights, engine, self.hook)

    def hook(self, op: Op, inputs: Sequence[Array], compute: Compute) -> Arrays:
        """See :data:`isobit.backends.reference.backend.Hook`."""
        if op.layer != self._layer or not op.kind.endswith(self._kind):
            return compute(op, inputs)
        return self._wrong(op, inputs, compute)


_WRONG: dict[str, tuple[str, Hook]] = {
    "rope-off-by-one": ("rope", lambda op, x, compute: compute(op, (x[0], x[1] + 1))),
    "swapped-kv": ("append", lambda op, x, compute: compute(op, x[::-1])),
    "swapped-kv-heads": ("append", lambda op, x, compute: compute(op, [v[:, ::-1] for v in x])),
    "int8-activations": (
        "matmul",
        lambda op, x, _: op.operation.specification(Context(planes=1), op.weights, *x),
    ),
    "reordered-sum": ("combine", lambda op, x, compute: compute(op, [v[:, ::-1] for v in x])),
}
"""The kind of operation that a fault is of (or how the kind's name ends), and what it does."""


def with_backend(model: Model, make: Make) -> Model:
    """A model of its own on the backend that ``make`` makes of the weights."""
    other = Model(model.path, "reference", model.engine)
    other.backend = make(Weights.from_file(other.file), other.engine)
    return other


def changed_weight(weights: Weights, name: str, change: Change) -> Weights:
    """Weights of which one tensor has other bytes."""
    w = weights.graph.weights[name]
    data = w.data.copy()
    change(data)
    graph = weights.graph.with_weights({name: replace(w, data=data)})
    return replace(weights, graph=graph)


def one_ulp(rng: np.random.Generator) -> Change:
    """Moves one value to the next number."""

    def change(value: NDArray[Any]) -> None:
        flat = value.reshape(-1)
        assert np.shares_memory(flat, value)
        i = int(rng.integers(flat.size))
        flat[i] = np.nextafter(flat[i], np.float32(np.inf))

    return change


@dataclass(frozen=True)
class Planted:
    """A fault at a place: where a comparison must report it first, and the backend that has it."""

    name: str
    place: Key
    make: Make

    def shows_in(self, graph: Graph, stages: Collection[str]) -> Key:
        """The first of these stages that it changes, if one: its place, unless that is hidden."""
        from_place = dropwhile(lambda key: key != self.place, graph.stages)
        return next((key for key in from_place if key[0] in stages), self.place)


def _swap_ranks(ids: NDArray[Any]) -> None:
    ids[-1, [0, 1]] = ids[-1, [1, 0]]


def _wrong_expert(ids: NDArray[Any]) -> None:
    ids[-1, -1] = next(e for e in range(ids.shape[1] + 1) if e not in ids[-1])


def _drop_expert(weights: NDArray[Any]) -> None:
    weights[:, 0] = 0


def _uniform(weights: NDArray[Any]) -> None:
    weights[:] = np.float32(1 / weights.shape[1])


def _nan(value: NDArray[Any]) -> None:
    value[-1, 0] = np.nan


_STAGE_FAULTS: dict[str, tuple[str, Change | None]] = {
    "one-ulp-norm": ("attn_norm", None),
    "one-ulp-attention": ("attention", None),
    "one-ulp-swiglu": ("moe_expert_swiglu", None),
    "one-ulp-combine": ("moe_ffn_out", None),
    "one-ulp-residual": ("post_ffn_residual", None),
    "swapped-ranks": ("moe_router_indices", _swap_ranks),
    "wrong-expert": ("moe_router_indices", _wrong_expert),
    "dropped-expert": ("moe_router", _drop_expert),
    "uniform-router": ("moe_router", _uniform),
    "nan": ("attn_out", _nan),
}
_LAYER_FAULTS = {
    "rope-off-by-one": "q_post_rope",
    "swapped-kv": "attention",
    "swapped-kv-heads": "attention",
    "int8-activations": "qkv_matmul",
    "reordered-sum": "moe_ffn_out",
}


def _flip_bits(blocks: NDArray[Any], _: str) -> None:
    blocks[:, blocks.shape[1] // 2] ^= 4  # a code of every block: a sub-scale of 0 hides one


def _swap_sub_scales(blocks: NDArray[Any], fmt: str) -> None:
    if fmt not in ("Q4_K", "Q5_K"):
        raise UsageError(f"swapped-sub-scales: expected experts in Q4_K or Q5_K, got {fmt}")
    blocks[:, [4, 5]] = blocks[:, [5, 4]]


_WEIGHT_FAULTS: dict[str, tuple[str, str, Callable[[NDArray[Any], str], None]]] = {
    "flipped-weight-bits": ("attn_q", "qkv_matmul", _flip_bits),
    "swapped-sub-scales": ("ffn_up_exps", "moe_expert_up", _swap_sub_scales),
}
FAULTS = (*_STAGE_FAULTS, *_LAYER_FAULTS, *_WEIGHT_FAULTS, *GRAPH_FAULTS)
"""Every fault that :func:`plant` knows. All need a mixture of experts."""


def plant(name: str, layer: int, rng: np.random.Generator) -> Planted:
    """A fault in a layer; raises UsageError for a name that is not in FAULTS."""
    if name in _STAGE_FAULTS:
        stage, change = _STAGE_FAULTS[name]
        change = change or one_ulp(rng)
        return Planted(name, (stage, layer), lambda w, e: ChangedStage(w, e, stage, layer, change))
    if name in _LAYER_FAULTS:
        return Planted(name, (_LAYER_FAULTS[name], layer), lambda w, e: OneLayer(w, e, layer, name))
    if name in GRAPH_FAULTS:
        at = min(layer, partner(layer)) if name == "swapped-layers" else layer
        return Planted(
            name,
            (GRAPH_FAULTS[name][1], at),
            lambda w, e: ReferenceBackend(rewritten(w, name, layer), e),
        )
    if name not in _WEIGHT_FAULTS:
        raise UsageError(f"fault: expected one of {', '.join(FAULTS)}; got {name!r}")
    role, stage, damage = _WEIGHT_FAULTS[name]
    tensor = f"blk.{layer}.{role}.weight"

    def damaged(weights: Weights, engine: EngineConfig) -> Backend:
        if tensor not in weights.graph.weights:
            raise UsageError(f"{name}: expected a model with {tensor}, it has none")
        fmt = weights.graph.weights[tensor].format

        def change(data: NDArray[Any]) -> None:
            damage(data.reshape(-1, fmt.block_bytes), fmt.name)

        return ReferenceBackend(changed_weight(weights, tensor, change), engine)

    return Planted(name, (stage, layer), damaged)
