"""What is found of one backend by itself: invariants, the same bits again, the cache."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from isobit.backends.base import F32
from isobit.contracts import kinds
from isobit.contracts.measure_speed import step_argmax
from isobit.contracts.target import Measured, Target
from isobit.errors import GateFailed, NothingCompared, NotRun
from isobit.runtime.model import Model
from isobit.verify.trace_file import where as place


def logits(model: Model, tokens: Sequence[int], chunk: int | None = None) -> F32:
    """Logits after every token, finite or not; the tokens in pieces of ``chunk``."""
    ids = model.checked(tokens)
    size = chunk or len(ids)
    with model.new_sequence() as sequence:
        parts = [ids[i : i + size] for i in range(0, len(ids), size)]
        return np.concatenate([np.array(model.forward(sequence, p, range(len(p)))) for p in parts])


def require_finite(values: F32, prompt: Sequence[int]) -> F32:
    """Raises GateFailed for logits with NaN: two runs that are broken alike agree in every bit."""
    if not np.isfinite(values).all():
        position = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
        raise GateFailed(
            f"logits: expected finite ones, got NaN or infinity at position {position} of the "
            f"prompt {brief(prompt)}"
        )
    return values


def brief(prompt: Sequence[int]) -> str:
    """A prompt's first tokens."""
    return (
        f"{list(prompt[:8])}" if len(prompt) <= 8 else f"{list(prompt[:8])[:-1]}… of {len(prompt)}"
    )


def _differing(a: F32, b: F32) -> int:
    return int(np.count_nonzero(a.view(np.uint32) != b.view(np.uint32)))


def require_experts(model: Model) -> None:
    """Raises NotRun for a dense model."""
    if not model.config.is_moe:
        raise NotRun("model: expected a mixture of experts, got a dense model")


def invariant(measure: kinds.Invariant, target: Target) -> Measured:
    """Sums of router weights, and values that are not finite, over every stage."""
    require_experts(target.model)
    c = target.model.config
    if "router_weight_deviation" in measure.threshold and c.n_experts_used == 1:
        raise NotRun("router_weight_deviation: expected several experts a token, got 1, always 1")
    if "router_weight_deviation" in measure.threshold and not c.normalise_experts:
        raise NotRun("router_weight_deviation: expected a model whose weights are to sum to 1")
    nonfinite = rows = values = 0
    deviation = 0.0
    where: dict[str, list[str]] = {"router_weight_deviation": [], "nonfinite_values": []}
    seen: set[tuple[str, int | None]] = set()

    def tap(stage: str, layer: int | None, value: Any) -> None:
        nonlocal nonfinite, rows, values, deviation
        seen.add((stage, layer))
        if value.dtype.kind != "f":
            return
        values += value.size
        bad = ~np.isfinite(value.reshape(len(value), -1)).all(axis=1)
        if bad.any():
            nonfinite += int(value.size - np.count_nonzero(np.isfinite(value)))
            at = int(np.flatnonzero(bad)[0])
            where["nonfinite_values"].append(f"{place(stage, layer)} at position {at}")
        if stage == "moe_router":
            w = value.astype(np.float64)  # and none below 0, which could make up for others
            off = np.maximum(np.abs(w.sum(axis=1) - 1), np.abs(np.abs(w).sum(axis=1) - 1))
            off = np.nan_to_num(off, nan=1.0)
            rows += len(off)
            if off.max() > deviation:
                deviation = float(off.max())
                weights = value[off.argmax()].tolist()
                found = f"layer {layer} position {int(off.argmax())}: {weights}"
                where["router_weight_deviation"] = [found]

    for prompt in measure.prompts:
        ids = target.model.checked(prompt)
        with target.model.new_sequence() as sequence:
            out = target.model.forward(sequence, ids, range(len(ids)), tap)
        nonfinite += int(out.size - np.count_nonzero(np.isfinite(out)))
    graph = target.model.graph
    routers = sum(stage == "moe_router" for stage, _ in graph.stages)
    if rows != routers * sum(map(len, measure.prompts)):
        raise NothingCompared(f"router weights: expected every token-layer's, got {rows}")
    fused = target.model.backend.fused_away
    stages = [k for k in graph.stages if k[0] not in graph.on_request and k not in fused]
    if lacking := [k for k in stages if k not in seen]:
        raise NothingCompared(f"{place(*lacking[0])}: expected its values, got none")
    figures = {"router_weight_deviation": min(deviation, 1.0), "nonfinite_values": float(nonfinite)}
    return Measured(
        figures, {"token_layers": rows, "values": values}, {"nonfinite_values": values}, where
    )


def determinism(measure: kinds.Determinism, target: Target) -> Measured:
    """Logits of the same tokens again, in one piece and in others."""
    differing = runs = most = 0
    where = []
    longest = max(map(len, measure.prompts))
    if wide := [c for c in measure.chunks if c >= longest]:
        raise NotRun(
            f"chunks: expected pieces smaller than a prompt, got {wide[0]} where the longest has "
            f"{longest} tokens: one piece again"
        )
    for prompt in measure.prompts:
        first = require_finite(logits(target.model, prompt), prompt)
        pieces = [c for c in measure.chunks if c < len(prompt)]
        for chunk in (*[None] * (measure.repeats - 1), *pieces):
            again = logits(target.model, prompt, chunk)
            differing += (found := _differing(first, again))
            most += first.size
            runs += 1
            if found:
                at = int(np.flatnonzero((first.view("u4") != again.view("u4")).any(axis=1))[0])
                how = "run again" if chunk is None else f"in pieces of {chunk}"
                where.append(f"prompt {brief(prompt)} {how}: {found} logits, from position {at}")
    return Measured(
        {"differing_values": differing},
        {"runs compared": runs},
        {"differing_values": most},
        {"differing_values": where},
    )


def kv_equivalence(measure: kinds.KvEquivalence, target: Target) -> Measured:
    """Logits of tokens decoded one by one, against running the whole text again."""
    model = target.model
    differing = tokens = most = 0
    where = []
    for prompt in measure.prompts:
        text = model.checked(prompt)
        rows = []
        with model.new_sequence() as sequence:
            rows.append(np.array(model.forward(sequence, text, [len(text) - 1])[0]))
            for _ in range(measure.tokens):
                text = [*text, int(rows[-1].argmax())]
                rows.append(np.array(model.forward(sequence, text[-1:], [0])[0]))
        decoded = np.stack(rows)
        again = require_finite(logits(model, text), text)[len(prompt) - 1 :]
        found = _differing(decoded, again)
        if found:
            at = int(np.flatnonzero((decoded.view("u4") != again.view("u4")).any(axis=1))[0])
            where.append(
                f"prompt {brief(prompt)}: {found} logits, from position {len(prompt) - 1 + at}"
            )
        wrong = _greedy_differs(model, prompt, text[len(prompt) :])
        if wrong:
            where.append(f"prompt {brief(prompt)}: {wrong} tokens chosen otherwise on the device")
        differing += found + wrong
        tokens += measure.tokens
        most += decoded.size
    return Measured(
        {"differing_values": differing},
        {"tokens decoded": tokens},
        {"differing_values": most},
        {"differing_values": where},
    )


def _greedy_differs(model: Model, prompt: list[int], expected: list[int]) -> int:
    """Tokens that greedy decoding without logits on the host chooses otherwise."""
    differing = 0
    with model.new_sequence() as sequence:
        model.forward(sequence, prompt, [])
        for token, following in pairwise(expected):
            differing += step_argmax(model, sequence, token) != following
    return differing
