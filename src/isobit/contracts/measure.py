"""Taking a measure: from a loaded model to the figures that a threshold bounds."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from isobit.backends.reference import ReferenceBackend
from isobit.config import EngineConfig
from isobit.contracts import kinds
from isobit.contracts.measure_alone import (
    brief,
    determinism,
    invariant,
    kv_equivalence,
    logits,
    require_experts,
)
from isobit.contracts.measure_speed import memory_used, throughput
from isobit.contracts.target import (
    Measured,
    Target,
    require_device,
    require_model,
    require_named,
    text_file,
)
from isobit.errors import GateFailed, NotRun
from isobit.runtime.model import Model
from isobit.verify import accuracy, blame, faults
from isobit.verify.compare import compare
from isobit.verify.diff import ArgmaxChange, Diff
from isobit.verify.oracle import Oracle
from isobit.verify.trace import Recordable, record

GATE = 0.99
"""The cosine that a layer's output must have to pass the classic gate."""


def take(measure: kinds.Measure, target: Target) -> Measured:
    """Take a measure. Raises NotRun, BackendUnavailable or UsageError where it cannot be taken
    here or would pass whatever the backend did, and other IsobitErrors where it failed at it."""
    require_model(measure.model, target.model)
    require_device(measure.device, target.model)
    if measure.kind in kinds.SPEED:
        require_named(measure)
    taken = _TAKERS[measure.kind](measure, target)
    for name in measure.threshold:
        if name not in taken.figures:
            why = "llama-bench to compare with; name it with --peer"
            if name != "ratio_to_peer":
                why = "a mixture of experts that leaves some out, got another model"
            raise NotRun(f"{name}: expected {why}")
    return taken


def _parity(measure: kinds.Parity, target: Target) -> Measured:
    diffs = _diffs(measure, target)
    stages = [s for d in diffs for s in d.stages]
    gate = blame.gate(diffs, GATE)
    differing = [
        f"prompt {i}: {line}"
        for i, d in enumerate(diffs)
        for line in blame.located(d, target.text, target.name, measure.against)
    ]
    cosines = [f"layer {i} at {gate.cosines[i]:.6g}" for i in gate.below]
    return Measured(
        {
            "differing_values": sum(s.distance.differing for s in stages),
            "layers_below_cosine_0_99": len(gate.below),
            "least_layer_cosine": min(gate.cosines.values()),
        },
        {
            "values": sum(s.distance.values for s in stages),
            "stages": len(stages),
            "tokens": sum(map(len, measure.prompts)),
            "classic gate": str(gate),
            "flipped": _flipped(diffs, measure.prompts),
        },
        {
            "differing_values": sum(s.distance.values for s in stages),
            "layers_below_cosine_0_99": len(gate.cosines),
        },
        {
            "differing_values": differing,
            "layers_below_cosine_0_99": cosines,
            "least_layer_cosine": cosines,
        },
    )


def _diffs(measure: kinds.Parity | kinds.RouterSets, target: Target) -> list[Diff]:
    """The comparison after each prompt. Raises GateFailed where both runs have NaN or infinity:
    broken alike, they would agree."""
    diffs = [target.diff(measure.against, prompt) for prompt in measure.prompts]
    for diff, prompt in zip(diffs, measure.prompts, strict=True):
        for s in diff.stages:
            if s.distance.nonfinite_a and s.distance.nonfinite_b:
                raise GateFailed(
                    f"{s.where}: expected finite values, got NaN or infinity on both sides after "
                    f"the prompt {brief(prompt)}"
                )
    return diffs


def _flipped(diffs: Sequence[Diff], prompts: Sequence[Sequence[int]]) -> list[int]:
    """The prompts, by their place in the list, that go on with another token."""
    return [
        i
        for i, (d, p) in enumerate(zip(diffs, prompts, strict=True))
        if d.nonfinite_rows or any(c.position == len(p) - 1 for c in d.argmax)
    ]


def _router_sets(measure: kinds.RouterSets, target: Target) -> Measured:
    _require_choice(target.model)
    diffs = _diffs(measure, target)
    rows = sum(d.router_rows for d in diffs)
    where = [
        f"prompt {i}: {blame.experts(c, target.name, measure.against)}"
        for i, d in enumerate(diffs)
        for c in d.router
    ]
    return Measured(
        {
            "changed_sets": sum(d.router_changed for d in diffs),
            "changed_orders": sum(d.router_reordered for d in diffs),
        },
        {"token_layers": rows, "flipped": _flipped(diffs, measure.prompts)},
        {"changed_sets": rows, "changed_orders": rows},
        {"changed_sets": where},
    )


def _argmax(measure: kinds.Argmax, target: Target) -> Measured:
    other = target.other(measure.against)
    positions = 0
    chosen: list[list[int]] = []
    flipped: list[int] = []
    where = []
    for i, prompt in enumerate(measure.prompts):
        a, b = logits(target.model, prompt), logits(other, prompt)
        if np.ptp(a[-1]) == 0 == np.ptp(b[-1]):
            raise NotRun(
                f"prompt {brief(prompt)}: expected one most likely token, got equal logits"
            )
        wrong = (a.argmax(1) != b.argmax(1)) | ~np.isfinite(a).all(1) | ~np.isfinite(b).all(1)
        positions += int(wrong.sum())
        chosen.append([int(a[-1].argmax()), int(b[-1].argmax())])
        if wrong[-1]:
            flipped.append(i)
            pair = chosen[-1]
            of_a, of_b = (float(z[-1, pair[0]] - z[-1, pair[1]]) for z in (a, b))
            change = ArgmaxChange(len(prompt) - 1, pair[0], pair[1], of_a, -of_b)
            line = blame.flip(change, target.text, target.name, measure.against)
            where.append(f"prompt {brief(prompt)}: {line}")
    figures = {"changed_prompts": float(len(flipped)), "changed_positions": float(positions)}
    agreed = f"{len(chosen) - len(flipped)} of {len(chosen)} prompts agree"
    return Measured(
        figures,
        {"agreement": agreed, "next_tokens": chosen, "flipped": flipped},
        {"changed_prompts": len(chosen), "changed_positions": sum(map(len, measure.prompts))},
        {"changed_prompts": where, "changed_positions": where},
    )


def _fault_injection(measure: kinds.FaultInjection, target: Target) -> Measured:
    require_experts(target.model)
    names = list(faults.FAULTS) if measure.faults == ["all"] else measure.faults
    missed, misplaced, not_shown = [], [], []
    graph = target.model.graph
    stages, hidden = frozenset(graph.names), {stage for stage, _ in target.model.backend.fused_away}
    if hidden:
        stages -= graph.on_request | hidden
    planted_in_all = 0
    for prompt in measure.prompts:
        clean = record(target.model, prompt, stages)
        with faults.with_backend(target.model, ReferenceBackend) as reference:
            if (off := compare(clean, record(reference, prompt, stages)).first) is not None:
                raise GateFailed(
                    f"expected the reference's bits where no fault is planted, got others at "
                    f"{blame.stage(off)}: every fault would be reported, for the wrong reason"
                )
        for name in names:
            layer = int(target.rng.integers(target.model.config.n_layers))
            planted = faults.plant(name, layer, target.rng)
            with faults.with_backend(target.model, planted.make) as faulty:
                first = compare(record(faulty, prompt, stages), clean).first
            where = f"{name} in layer {layer}"
            if first is None and planted.place[0] in hidden:  # rounded away behind it
                not_shown.append(f"{name}: no {planted.place[0]} to compare")
                continue
            planted_in_all += 1
            if first is None:
                missed.append(where)
            elif (first.stage, first.layer) != planted.shows_in(graph, stages):
                misplaced.append(f"{where}: reported at {first.where}")
    figures = {"missed_faults": float(len(missed)), "misplaced_faults": float(len(misplaced))}
    if not planted_in_all:
        raise NotRun(f"faults: expected one that the backend's stages show, got {not_shown[0]}")
    return Measured(
        figures,
        {"planted": planted_in_all, "missed": missed, "misplaced": misplaced}
        | ({"not shown": sorted({*not_shown})} if not_shown else {}),
        dict.fromkeys(figures, planted_in_all),
        {"missed_faults": missed, "misplaced_faults": misplaced},
    )


def _accuracy(measure: kinds.Accuracy, target: Target) -> Measured:
    yardstick: Recordable = Oracle.of(target.model.file)
    if measure.against == "hf":
        from isobit.verify.hf import Transformers  # noqa: PLC0415 - needs PyTorch

        yardstick = Transformers.of(target.model.file)
    if measure.text is not None:
        try:
            text = text_file(target.root, measure.text).decode()
        except UnicodeDecodeError as error:
            raise NotRun(f"text: expected {measure.text} in UTF-8, got: {error}") from None
        parts = [target.model.tokenize(text)[: measure.tokens]]
        if len(parts[0]) < measure.tokens:
            raise NotRun(
                f"text: expected {measure.tokens} tokens in {measure.text}, got {len(parts[0])}"
            )
    else:
        parts = measure.prompts or []
    sizes = [accuracy.WINDOW if measure.text is not None else len(ids) for ids in parts]
    found = [
        accuracy.measure([target.model], yardstick, ids, size)[0]
        for ids, size in zip(parts, sizes, strict=True)
    ]
    tokens = sum(a.tokens for a in found)
    nll = sum(a.nll_sum - a.oracle_nll_sum for a in found) / sum(a.predicted for a in found)
    figures = {
        "mean_kl": sum(a.kl_sum for a in found) / tokens,
        "top1_kept": sum(a.top1_kept for a in found) / tokens,
        "perplexity_change": float(np.expm1(nll)),
    }
    c = target.model.config
    if (rows := sum(a.token_layers for a in found)) and c.n_experts_used < c.n_experts:
        figures["changed_sets"] = sum(a.changed_sets for a in found) / rows
    blind = math.log(c.vocab)  # what knowing nothing comes to
    about: dict[str, Any] = {"tokens": tokens}
    if measure.text is None:
        about["flipped"] = [i for i, a in enumerate(found) if a.flip is not None]
    return Measured(figures, about, {"mean_kl": blind}, _apart(measure, found, target))


def _apart(
    measure: kinds.Accuracy, found: Sequence[accuracy.Accuracy], target: Target
) -> dict[str, list[str]]:
    """Where a backend and a yardstick are furthest apart."""
    names = ["text" if measure.text is not None else f"prompt {i}" for i in range(len(found))]
    of, worst = max(zip(names, found, strict=True), key=lambda pair: pair[1].kl_max)
    far = [f"{of}: KL {worst.kl_max:.3g} after position {worst.kl_max_at}"]
    sets, flips = [], []
    for of, a in zip(names, found, strict=True):
        if a.first_changed is not None:
            layer, position = a.first_changed
            sets.append(f"{of}: first in layer {layer} at position {position}")
        if a.flip is not None:
            flip = blame.flip(a.flip, target.text, target.name, measure.against)
            flips.append(f"{of}: {flip}")
    return {"mean_kl": far + flips, "changed_sets": sets, "top1_kept": flips + far}


def _require_choice(model: Model) -> None:
    """Raises NotRun where every expert is chosen for every token: the sets could not differ."""
    require_experts(model)
    if model.config.n_experts_used >= model.config.n_experts:
        raise NotRun("model: expected experts that are left out, got all of them chosen each time")


_TAKERS: dict[str, Callable[[Any, Target], Measured]] = {
    "parity": _parity,
    "router_sets": _router_sets,
    "argmax": _argmax,
    "invariant": invariant,
    "determinism": determinism,
    "kv_equivalence": kv_equivalence,
    "fault_injection": _fault_injection,
    "accuracy": _accuracy,
    "throughput": throughput,
    "memory": memory_used,
}


def longest(measures: Sequence[kinds.Measure]) -> int:
    """The longest sequence that any of the measures needs, in tokens."""

    def lengths(measure: kinds.Measure) -> Iterator[int]:
        prompts = getattr(measure, "prompts", None) or []
        yield 1
        yield from (len(p) for p in prompts)
        if isinstance(measure, kinds.KvEquivalence):
            yield max(len(p) for p in prompts) + measure.tokens
        elif isinstance(measure, kinds.Accuracy) and measure.text is not None:
            yield min(measure.tokens, accuracy.WINDOW)
        elif isinstance(measure, kinds.Throughput):
            yield measure.depth + measure.tokens + 1
        elif isinstance(measure, kinds.Memory):
            yield measure.context

    return max(n for measure in measures for n in lengths(measure))


def engine_for(
    measures: Sequence[kinds.Measure], threads: int | None, bits: int = 16
) -> EngineConfig:
    """Settings with room for the longest of the measures."""
    context = longest(measures)
    return EngineConfig(bits, threads=threads, context=context, max_sequences=2)
