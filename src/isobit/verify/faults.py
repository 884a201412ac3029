"""The reference with a planted fault: a comparison that does not notice it is worth nothing."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isobit import numerics
from isobit.backends.base import F32, I32, Backend, Batch, Tap
from isobit.backends.reference import ReferenceBackend
from isobit.config import EngineConfig
from isobit.errors import UsageError
from isobit.model.weights import Layer, Weights
from isobit.runtime.model import Model

Change = Callable[[NDArray[Any]], None]
"""Changes an array in place."""
Make = Callable[[Weights, EngineConfig], Backend]
Place = tuple[str, int | None]
"""(stage, layer)"""

EXPERT_STAGES = ("moe_expert_gate", "moe_expert_up", "moe_expert_swiglu", "moe_expert_out")


class ChangedStage(ReferenceBackend):
    """Changes the value of one stage of one layer, so that all that follows is computed from it."""

    def __init__(
        self, weights: Weights, engine: EngineConfig, stage: str, layer: int | None, change: Change
    ) -> None:
        super().__init__(weights, engine)
        self._place, self._change = (stage, layer), change

    def forward(
        self, batch: Batch, tap: Tap | None = None, stages: frozenset[str] | None = None
    ) -> F32:
        """As ReferenceBackend's, with the change."""

        def changing(stage: str, layer: int | None, value: NDArray[np.generic]) -> None:
            if (stage, layer) == self._place and stage not in EXPERT_STAGES:
                self._change(value)
            if tap is not None and (stages is None or stage in stages):
                tap(stage, layer, value)

        return super().forward(batch, changing, None)

    def _experts(self, layer: Layer, h: F32, ids: I32) -> tuple[F32, F32, F32, F32]:
        """The experts once more, with a place to change each stage before the next."""
        index = next(i for i, w in enumerate(self._w.layers) if w.gate is layer.gate)

        def changed(stage: str, value: F32) -> F32:
            if (stage, index) == self._place:
                self._change(value)
            return value

        gate, up, a, y = super()._experts(layer, h, ids)
        gate, up = changed("moe_expert_gate", gate), changed("moe_expert_up", up)
        if self._place[0] in EXPERT_STAGES:
            a = changed("moe_expert_swiglu", numerics.silu_gate(gate, up))
            for e in np.unique(ids).tolist():
                at = np.nonzero(ids == e)
                y[at] = self._matmul(layer.down.expert(e), a[at])
        return gate, up, a, changed("moe_expert_out", y)


class OneLayer(ReferenceBackend):
    """Runs one layer's attention or feed-forward with other settings."""

    def __init__(self, weights: Weights, engine: EngineConfig, layer: int, fault: str) -> None:
        super().__init__(weights, engine)
        self._layer, self._fault = layer, fault

    def _attention_block(
        self, x: F32, layer: Layer, cache: Any, batch: Batch, turn: tuple[F32, F32], *rest: Any
    ) -> F32:
        if layer is not self._w.layers[self._layer]:
            return super()._attention_block(x, layer, cache, batch, turn, *rest)
        if self._fault == "rope-off-by-one":
            positions = batch.positions + 1
            cos, sin = numerics.rope_table(self._frequencies, 0, int(positions.max()) + 1)
            turn = (cos[positions], sin[positions])
        append = cache.append
        if self._fault == "swapped-kv-heads":
            cache.append = lambda b, k, v: append(b, k[:, ::-1].copy(), v[:, ::-1].copy())
        if self._fault == "swapped-kv":
            cache.append = lambda b, k, v: append(b, v, k)
        try:
            return self._coarse(super()._attention_block, x, layer, cache, batch, turn, *rest)
        finally:
            cache.__dict__.pop("append", None)

    def _feed_forward_block(self, x: F32, layer: Layer, t: Callable[..., None]) -> F32:
        if layer is not self._w.layers[self._layer]:
            return super()._feed_forward_block(x, layer, t)
        seen: dict[str, F32] = {}

        def reordering(stage: str, value: Any) -> None:
            seen[stage] = value
            if stage == "moe_ffn_out" and self._fault == "reordered-sum":
                if self._c.n_experts_used < 3:
                    raise UsageError("reordered-sum: expected a sum of 3 experts or more")
                last_first = (seen[s][:, ::-1] for s in ("moe_router", "moe_expert_out"))
                value[:] = numerics.combine(*last_first)
            t(stage, value)

        return self._coarse(super()._feed_forward_block, x, layer, reordering)

    def _coarse(self, block: Callable[..., F32], *args: Any) -> F32:
        planes = self._planes
        self._planes = 1 if self._fault == "int8-activations" else planes
        try:
            return block(*args)
        finally:
            self._planes = planes


def with_backend(model: Model, make: Make) -> Model:
    """A model of its own on the backend that ``make`` makes of the weights."""
    other = Model(model.path, "reference", model.engine)
    other.backend = make(Weights.from_file(other.file), other.engine)
    return other


def changed_weight(weights: Weights, layer: int, role: str, change: Change) -> Weights:
    """Weights whose ``role`` in ``layer`` has other bytes."""
    w = getattr(weights.layers[layer], role)
    data = w.data.copy()
    change(data)
    layers = list(weights.layers)
    layers[layer] = replace(layers[layer], **{role: replace(w, data=data)})
    return replace(weights, layers=tuple(layers))


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
    place: Place
    make: Make


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
    "flipped-weight-bits": ("q", "qkv_matmul", _flip_bits),
    "swapped-sub-scales": ("up", "moe_expert_up", _swap_sub_scales),
}
FAULTS = (*_STAGE_FAULTS, *_LAYER_FAULTS, *_WEIGHT_FAULTS)
"""Every fault that :func:`plant` knows. All need a mixture of experts."""


def plant(name: str, layer: int, rng: np.random.Generator) -> Planted:
    """A fault in a layer; raises UsageError for a name that is not in FAULTS."""
    if name in _STAGE_FAULTS:
        stage, change = _STAGE_FAULTS[name]
        change = change or one_ulp(rng)
        return Planted(name, (stage, layer), lambda w, e: ChangedStage(w, e, stage, layer, change))
    if name in _LAYER_FAULTS:
        return Planted(name, (_LAYER_FAULTS[name], layer), lambda w, e: OneLayer(w, e, layer, name))
    if name not in _WEIGHT_FAULTS:
        raise UsageError(f"fault: expected one of {', '.join(FAULTS)}; got {name!r}")
    role, stage, damage = _WEIGHT_FAULTS[name]

    def damaged(weights: Weights, engine: EngineConfig) -> Backend:
        fmt = getattr(weights.layers[layer], role).format

        def change(data: NDArray[Any]) -> None:
            damage(data.reshape(-1, fmt.block_bytes), fmt.name)

        return ReferenceBackend(changed_weight(weights, layer, role, change), engine)

    return Planted(name, (stage, layer), damaged)
