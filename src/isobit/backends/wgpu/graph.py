"""The pass of docs/numerics.md, section 9, as steps, and where its stages can be read."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isobit.backends.wgpu.device import Device, Step
from isobit.backends.wgpu.load import DeviceLayer, DeviceWeights
from isobit.backends.wgpu.memory import Plan
from isobit.backends.wgpu.ops import BatchAt, CachePart, Heads, Ops
from isobit.config import ModelConfig


@dataclass(frozen=True)
class Mark:
    """A stage that can be read once the steps before it have run."""

    stage: str
    layer: int | None
    buffer: Any
    shape: tuple[int, ...]
    at: int = 0
    """Word of the buffer, or of each row, at which it begins."""
    stride: int = 0
    """Words from one row (the last axis) to the next, if they do not follow one another."""
    dtype: type[np.generic] = np.float32

    def read(self, device: Device) -> NDArray[np.generic]:
        """Its values."""
        rows, width = prod(self.shape[:-1]), self.shape[-1]
        if not self.stride:
            value = device.read(self.buffer, self.dtype, rows * width, 4 * self.at)
        else:
            value = device.read(self.buffer, self.dtype, rows * self.stride)
            value = value.reshape(rows, self.stride)[:, self.at : self.at + width]
        return value.reshape(self.shape)


@dataclass(frozen=True)
class Shape:
    """What decides the steps of a pass."""

    tokens: int
    rows: int
    """Of logits."""
    tiles: int
    """Of the longest sequence."""


class Graph:
    """Makes the steps of a pass over one model's buffers.

    The residual goes back and forth between two states (norm.wgsl): attention begins with the norm
    into ``state`` and ends with the one into ``state_b``, the feed-forward the other way round.
    """

    def __init__(
        self,
        config: ModelConfig,
        plan: Plan,
        ops: Ops,
        weights: DeviceWeights,
        buffers: Mapping[str, Any],
        cache: Sequence[Sequence[CachePart]],
    ) -> None:
        self._c = config
        self._plan = plan
        self._ops = ops
        self._w = weights
        self._b = buffers
        self._cache = cache
        self._heads = Heads(config.n_heads, config.n_kv_heads, config.head_dim)
        self._eps = np.float32(config.eps)
        self._region = plan.tokens * config.hidden  # words of one array of a state

    def steps(self, shape: Shape, *, traced: bool) -> Iterator[Step | Mark]:
        """Everything up to the logits; ``traced``: with the last layer's end and the final norm."""
        n = shape.tokens
        yield self._state("embedding", None, "state_b", 0, n)
        for i, layer in enumerate(self._w.layers):
            yield self._norm(layer.attn_norm, n, ffn=i > 0)
            if i:
                yield from self._ffn_end(i - 1, n)
            yield self._state("attn_norm", i, "state", 1, n)
            yield from self._attention_block(i, layer, shape)
            yield self._norm(layer.ffn_norm, n, attention=True)
            yield self._state("post_attn_residual", i, "state_b", 0, n)
            yield self._state("ffn_norm", i, "state_b", 1, n)
            yield from self._feed_forward_block(i, layer, n)
        if traced:
            yield self._norm(self._w.output_norm, n, ffn=True)
            yield from self._ffn_end(self._c.n_layers - 1, n)
            yield self._state("final_norm", None, "state", 1, n)

    def logits(self, shape: Shape, first: int, count: int) -> Iterator[Step]:
        """Logits of ``count`` of the wanted rows, once :meth:`steps` have run."""
        at = BatchAt.of(shape.tokens, shape.rows, self._c.head_dim)
        yield self._norm(self._w.output_norm, count, ffn=True, rows_at=at.rows + first)
        b = self._b
        yield from self._ops.matmul(
            self._w.output, b["state"], self._region, b["acts"], b["logits"], items=count
        )

    def _attention_block(self, i: int, layer: DeviceLayer, shape: Shape) -> Iterator[Step | Mark]:
        c, o, b, h, n = self._c, self._ops, self._b, self._heads, shape.tokens
        at = BatchAt.of(n, shape.rows, c.head_dim)
        yield from o.matmul(layer.qkv, b["state"], self._region, b["acts"], b["qkv"], items=n)
        width = layer.qkv.rows
        yield Mark("qkv_matmul", i, b["qkv"], (n, width))
        for part in self._cache[i]:
            yield o.head_vectors(
                h,
                part,
                b["qkv"],
                self._w.vectors,
                b["batch"],
                b["rope"],
                b["queries"],
                q_norm_at=layer.q_norm,
                k_norm_at=layer.k_norm,
                eps=self._eps,
                at=at,
                tokens=n,
            )
        q_width = c.n_heads * c.head_dim
        shapes = (n, c.n_heads, c.head_dim), (n, c.n_kv_heads, c.head_dim)
        yield Mark("q_post_rope", i, b["rope"], shapes[0])
        yield Mark("k_post_rope", i, b["rope"], shapes[1], at=n * q_width)
        at_once = self._plan.partial_tiles // shape.tiles
        for first in range(0, n, at_once):
            some = min(at_once, n - first)
            for part in self._cache[i]:
                yield o.attention(
                    h,
                    part,
                    b["queries"],
                    b["batch"],
                    b["partial"],
                    at=at,
                    first=first,
                    tokens=some,
                    tiles=shape.tiles,
                )
            yield o.merge(
                h,
                b["partial"],
                b["batch"],
                b["attention"],
                b["acts"],
                first=first,
                tokens=some,
                tiles=shape.tiles,
            )
        yield Mark("attention", i, b["attention"], (n, q_width))
        yield from o.matmul(layer.attn_output, b["attention"], 0, b["acts"], b["output"], items=n)
        yield Mark("attn_out", i, b["output"], (n, c.hidden))

    def _feed_forward_block(self, i: int, layer: DeviceLayer, n: int) -> Iterator[Step | Mark]:
        c, o, b = self._c, self._ops, self._b
        prefix, k, experts = "ffn_", 1, None
        front: tuple[int, ...] = (n,)
        if layer.router is not None:
            prefix, k, front = "moe_expert_", c.n_experts_used, (n, c.n_experts_used)
            logits, weights, plan = b["router_logits"], b["router_weights"], b["plan"]
            yield from o.matmul(
                layer.router, b["state_b"], self._region, b["acts"], logits, items=n
            )
            yield Mark("moe_router_logits", i, logits, (n, c.n_experts))
            steps, experts = o.top_k(
                logits,
                b["probabilities"],
                weights,
                plan,
                experts=c.n_experts,
                k=k,
                normalise=c.normalise_experts,
                tokens=n,
            )
            yield from steps
            yield Mark("moe_router", i, weights, (n, k))
            yield Mark("moe_router_indices", i, plan, (n, k), dtype=np.int32)
        gate_up = b["gate_up"]
        yield from o.matmul(
            layer.gate_up,
            b["state_b"],
            self._region,
            b["acts"],
            gate_up,
            items=n * k,
            experts=experts,
        )
        yield Mark(prefix + "gate", i, gate_up, (*front, c.ffn), stride=2 * c.ffn)
        yield Mark(prefix + "up", i, gate_up, (*front, c.ffn), at=c.ffn, stride=2 * c.ffn)
        yield o.swiglu(gate_up, b["swiglu"], b["acts"], n=c.ffn, rows=n * k)
        yield Mark(prefix + "swiglu", i, b["swiglu"], (*front, c.ffn))
        yield from o.matmul(
            layer.down,
            b["swiglu"],
            0,
            b["acts"],
            b["output"],
            items=n * k,
            experts=None if experts is None else replace(experts, divide=1),
        )
        yield Mark(prefix + "out", i, b["output"], (*front, c.hidden))

    def _norm(
        self,
        weight_at: int,
        rows: int,
        *,
        attention: bool = False,
        ffn: bool = False,
        rows_at: int | None = None,
    ) -> Step:
        """The norm behind attention, behind a feed-forward, or behind the embedding."""
        b = self._b
        k = self._c.n_experts_used if ffn and self._c.is_moe else 1
        return self._ops.norm(
            b["state" if attention else "state_b"],
            b["state_b" if attention else "state"],
            self._w.vectors,
            b["acts"],
            n=self._c.hidden,
            rows=rows,
            region=self._region,
            weight_at=weight_at,
            eps=self._eps,
            output=b["output"],
            outputs=k if attention or ffn else 0,
            router_weights=b["router_weights"] if ffn and self._c.is_moe else None,
            batch=b["batch"],
            rows_at=rows_at,
        )

    def _ffn_end(self, i: int, n: int) -> Iterator[Mark]:
        """What the norm behind a feed-forward leaves."""
        if self._c.is_moe:
            yield self._state("moe_ffn_out", i, "state", 2, n)
        yield self._state("post_ffn_residual", i, "state", 0, n)

    def _state(self, stage: str, layer: int | None, name: str, array: int, n: int) -> Mark:
        return Mark(stage, layer, self._b[name], (n, self._c.hidden), at=array * self._region)
