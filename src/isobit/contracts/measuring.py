"""Taking a measure: from a loaded model to the figures that a threshold bounds."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from isobit.backends.base import F32
from isobit.config import EngineConfig
from isobit.contracts import measures as m
from isobit.contracts.speed import memory_used, throughput
from isobit.contracts.subject import Measured, Subject, require_device, require_model
from isobit.errors import NothingCompared, NotRun
from isobit.runtime.model import Model
from isobit.verify import accuracy, faults
from isobit.verify.compare import compare
from isobit.verify.oracle import Oracle
from isobit.verify.trace import Recordable, record

GATE = 0.99
"""The cosine that a layer's output must have to pass the classic gate."""


def take(measure: m.Measure, subject: Subject) -> Measured:
    """Take a measure. Raises NotRun, BackendUnavailable or UsageError where it cannot be taken
    here, and other IsobitErrors where the backend failed at it."""
    require_model(measure.model, subject.model)
    require_device(measure.device, subject.model)
    taken = _TAKERS[measure.kind](measure, subject)
    for name in measure.threshold:
        if name not in taken.figures:
            raise NotRun(f"{name}: expected llama-bench to compare with; name it with --peer")
    return taken


def logits(model: Model, tokens: Sequence[int], chunk: int | None = None) -> F32:
    """Logits after every token, finite or not; the tokens in pieces of ``chunk``."""
    ids = model.checked(tokens)
    size = chunk or len(ids)
    with model.new_sequence() as sequence:
        parts = [ids[i : i + size] for i in range(0, len(ids), size)]
        return np.concatenate([np.array(model.forward(sequence, p, range(len(p)))) for p in parts])


def _differing(a: F32, b: F32) -> int:
    return int(np.count_nonzero(a.view(np.uint32) != b.view(np.uint32)))


def _parity(measure: m.Parity, subject: Subject) -> Measured:
    differing = values = stages = 0
    cosines: dict[int, float] = {}
    for prompt in measure.prompts:
        diff = subject.diff(measure.against, prompt)
        for s in diff.stages:
            stages += 1
            differing += s.distance.differing
            values += s.distance.values
            if s.stage == "post_ffn_residual" and s.layer is not None:
                cosine = s.distance.cosine
                broken = cosine is None or s.distance.nonfinite_a or s.distance.nonfinite_b
                found = -1.0 if broken else float(cosine or 0.0)
                cosines[s.layer] = min(found, cosines.get(s.layer, 1.0))
    layers = len(cosines)
    below = sum(not c >= GATE for c in cosines.values())
    return Measured(
        {
            "differing_values": differing,
            "layers_below_cosine_0_99": below,
            "least_layer_cosine": min(cosines.values()),
        },
        {
            "values": values,
            "stages": stages,
            "tokens": sum(map(len, measure.prompts)),
            "classic gate": f"cosine >= {GATE} at {layers - below} of {layers} layers",
        },
    )


def _router_sets(measure: m.RouterSets, subject: Subject) -> Measured:
    _require_experts(subject.model)
    diffs = [subject.diff(measure.against, p) for p in measure.prompts]
    return Measured(
        {
            "changed_sets": sum(d.router_changed for d in diffs),
            "changed_orders": sum(d.router_reordered for d in diffs),
        },
        {"token_layers": sum(d.router_rows for d in diffs)},
    )


def _argmax(measure: m.Argmax, subject: Subject) -> Measured:
    other = subject.other(measure.against)
    last = positions = 0
    chosen = []
    for prompt in measure.prompts:
        a, b = logits(subject.model, prompt), logits(other, prompt)
        wrong = (a.argmax(1) != b.argmax(1)) | ~np.isfinite(a).all(1) | ~np.isfinite(b).all(1)
        last += bool(wrong[-1])
        positions += int(wrong.sum())
        chosen.append([int(a[-1].argmax()), int(b[-1].argmax())])
    figures = {"changed_prompts": float(last), "changed_positions": float(positions)}
    agreed = f"{len(chosen) - last} of {len(chosen)} prompts agree"
    return Measured(figures, {"agreement": agreed, "next_tokens": chosen})


def _invariant(measure: m.Invariant, subject: Subject) -> Measured:
    _require_experts(subject.model)
    nonfinite = rows = values = 0
    deviation = 0.0

    def tap(stage: str, _: int | None, value: Any) -> None:
        nonlocal nonfinite, rows, values, deviation
        if value.dtype.kind != "f":
            return
        values += value.size
        nonfinite += int(value.size - np.count_nonzero(np.isfinite(value)))
        if stage == "moe_router":
            off = np.abs(value.astype(np.float64).sum(axis=1) - 1)
            rows += len(off)
            deviation = max(deviation, float(np.nan_to_num(off, nan=1.0).max()))

    for prompt in measure.prompts:
        ids = subject.model.checked(prompt)
        with subject.model.new_sequence() as sequence:
            out = subject.model.forward(sequence, ids, range(len(ids)), tap)
        nonfinite += int(out.size - np.count_nonzero(np.isfinite(out)))
    if rows != subject.model.config.n_layers * sum(map(len, measure.prompts)):
        raise NothingCompared(f"router weights: expected every token-layer's, got {rows}")
    figures = {"router_weight_deviation": min(deviation, 1.0), "nonfinite_values": float(nonfinite)}
    return Measured(figures, {"token_layers": rows, "values": values})


def _determinism(measure: m.Determinism, subject: Subject) -> Measured:
    differing = runs = 0
    for prompt in measure.prompts:
        first = logits(subject.model, prompt)
        for chunk in (*[None] * (measure.repeats - 1), *measure.chunks):
            differing += _differing(first, logits(subject.model, prompt, chunk))
            runs += 1
    return Measured({"differing_values": differing}, {"runs compared": runs})


def _kv_equivalence(measure: m.KvEquivalence, subject: Subject) -> Measured:
    model = subject.model
    differing = tokens = 0
    for prompt in measure.prompts:
        text = model.checked(prompt)
        rows = []
        with model.new_sequence() as sequence:
            rows.append(np.array(model.forward(sequence, text, [len(text) - 1])[0]))
            for _ in range(measure.tokens):
                text = [*text, int(rows[-1].argmax())]
                rows.append(np.array(model.forward(sequence, text[-1:], [0])[0]))
        again = logits(model, text)[len(prompt) - 1 :]
        differing += _differing(np.stack(rows), again)
        differing += _greedy_differs(model, prompt, text[len(prompt) :])
        tokens += measure.tokens
    return Measured({"differing_values": differing}, {"tokens decoded": tokens})


def _greedy_differs(model: Model, prompt: list[int], expected: list[int]) -> int:
    """Tokens that greedy decoding without logits on the host chooses otherwise."""
    differing = 0
    with model.new_sequence() as sequence:
        model.forward(sequence, prompt, [])
        for token, following in pairwise(expected):
            chosen = model.likeliest(sequence, token)
            if chosen is None:
                return 0
            differing += chosen != following
    return differing


def _fault_injection(measure: m.FaultInjection, subject: Subject) -> Measured:
    _require_experts(subject.model)
    names = list(faults.FAULTS) if measure.faults == ["all"] else measure.faults
    missed, misplaced = [], []
    for prompt in measure.prompts:
        clean = record(subject.model, prompt)
        for name in names:
            layer = int(subject.rng.integers(subject.model.config.n_layers))
            planted = faults.plant(name, layer, subject.rng)
            with faults.with_backend(subject.model, planted.make) as faulty:
                first = compare(record(faulty, prompt), clean).first
            where = f"{name} in layer {layer}"
            if first is None:
                missed.append(where)
            elif (first.stage, first.layer) != planted.place:
                misplaced.append(f"{where}: {first.where}")
    figures = {"missed_faults": float(len(missed)), "misplaced_faults": float(len(misplaced))}
    about = {"planted": len(names) * len(measure.prompts)}
    return Measured(figures, about | {"missed": missed, "misplaced": misplaced})


def _accuracy(measure: m.Accuracy, subject: Subject) -> Measured:
    yardstick: Recordable = Oracle.of(subject.model.file)
    if measure.against == "hf":
        from isobit.verify.hf import Transformers  # noqa: PLC0415 - needs PyTorch

        yardstick = Transformers.of(subject.model.file)
    if measure.text is not None:
        try:
            text = (subject.root / measure.text).read_text("utf-8")
        except (OSError, ValueError) as error:
            raise NotRun(f"text: expected {measure.text}, got: {error}") from None
        parts = [subject.model.tokenize(text)[: measure.tokens]]
    else:
        parts = measure.prompts or []
    found = [accuracy.measure([subject.model], yardstick, ids)[0] for ids in parts]
    tokens = sum(a.tokens for a in found)
    nll = sum(a.nll_sum - a.oracle_nll_sum for a in found) / sum(a.predicted for a in found)
    figures = {
        "mean_kl": sum(a.kl_sum for a in found) / tokens,
        "top1_kept": sum(a.top1_kept for a in found) / tokens,
        "perplexity_change": float(np.expm1(nll)),
    }
    if rows := sum(a.token_layers for a in found):
        figures["changed_sets"] = sum(a.changed_sets for a in found) / rows
    return Measured(figures, {"tokens": tokens})


def _require_experts(model: Model) -> None:
    if not model.config.is_moe:
        raise NotRun("model: expected a mixture of experts, got a dense model")


_TAKERS: dict[str, Callable[[Any, Subject], Measured]] = {
    "parity": _parity,
    "router_sets": _router_sets,
    "argmax": _argmax,
    "invariant": _invariant,
    "determinism": _determinism,
    "kv_equivalence": _kv_equivalence,
    "fault_injection": _fault_injection,
    "accuracy": _accuracy,
    "throughput": throughput,
    "memory": memory_used,
}


def longest(measures: Sequence[m.Measure]) -> int:
    """The longest sequence that any of the measures needs, in tokens."""

    def lengths(measure: m.Measure) -> Iterator[int]:
        prompts = getattr(measure, "prompts", None) or []
        yield 1
        yield from (len(p) for p in prompts)
        if isinstance(measure, m.KvEquivalence):
            yield max(len(p) for p in prompts) + measure.tokens
        elif isinstance(measure, m.Accuracy) and measure.text is not None:
            yield min(measure.tokens, accuracy.WINDOW)
        elif isinstance(measure, m.Throughput):
            yield measure.depth + measure.tokens + 1
        elif isinstance(measure, m.Memory):
            yield measure.context

    return max(n for measure in measures for n in lengths(measure))


def engine_for(measures: Sequence[m.Measure], threads: int | None) -> EngineConfig:
    """Settings with room for the longest of the measures."""
    return EngineConfig(threads=threads, context=longest(measures), max_sequences=2)
