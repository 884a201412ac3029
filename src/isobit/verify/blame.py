"""Where two runs part, in words: stage, layer, position, experts and margins, tokens as text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isnan

from isobit.errors import IsobitError, NothingCompared
from isobit.verify.diff import ArgmaxChange, Diff, RouterChange, StageDiff
from isobit.verify.fit import Fit, in_words

Text = Callable[[int], str]
"""The text of a token."""
OUTPUT = "post_ffn_residual"
"""The stage that is a layer's output."""


def texts(decode: Callable[[Sequence[int]], str]) -> Text:
    """The text of a token by a model's ``decode``; of one without a tokenizer, the bare number."""

    def text(token: int) -> str:
        try:
            return repr(decode([token]))
        except IsobitError:
            return "no text"

    return text


def number(value: float | None, digits: int = 3) -> str:
    """A figure as it is shown; "-" for one that there is not."""
    return "-" if value is None else f"{value:.{digits}g}"


def stage(s: StageDiff) -> str:
    """A stage that differs: where, from which position, how far."""
    d = s.distance
    bad = ", NaN or infinite values" if d.nonfinite_a or d.nonfinite_b else ""
    return (
        f"{s.where} from position {d.first_position}: {d.differing} of {d.values} values, "
        f"cosine {number(d.cosine, 6)}, relative RMS {number(d.relative_rms)}{bad}"
    )


def fits(diff: Diff) -> list[str]:
    """The arithmetics that faulty operations were found to be done in, one line each."""
    found: dict[str, list[tuple[str, Fit]]] = {}
    for s in diff.stages:
        if s.fit is not None:
            side = "B" if s.origin == "faulty in B" else "A"
            found.setdefault(side, []).append((s.stage, s.fit))
    return [f"{side}'s {line}" for side, pairs in found.items() for line in in_words(pairs)]


def beyond(diff: Diff) -> str | None:
    """The first operation that is off by more than float32 explains, by itself.

    None where isobit's own bits are compared, which need no such measure, or nothing was replayed.
    """
    replayed = any(s.origin is not None or s.own_error is not None for s in diff.stages)
    if not replayed or (diff.a.numerics is not None and diff.b.numerics is not None):
        return None
    if not diff.beyond:
        return "no operation is off by more than float32 rounding explains"
    s = diff.beyond[0]
    own = None if s.own_error is None else s.own_error.relative_rms
    return (
        f"first beyond float32 rounding: {s.where}, off by itself by a relative RMS of "
        f"{number(own)}; {len(diff.beyond)} of {len(diff.stages)} stages are"
    )


def experts(c: RouterChange, a: str = "A", b: str = "B") -> str:
    """A token whose experts differ: which, with which margins, and why."""

    def ids(chosen: Sequence[int]) -> str:
        return "+".join(map(str, chosen)) or "none"

    return (
        f"layer {c.layer} position {c.position}: {a} took {ids(c.only_a)}, {b} {ids(c.only_b)}; "
        f"margins {number(c.margin_a)} and {number(c.margin_b)}, logits moved by "
        f"{number(c.drift)}: {c.cause}"
    )


def flip(c: ArgmaxChange, text: Text | None, a: str = "A", b: str = "B") -> str:
    """A position after which the next token differs: both tokens and their texts."""

    def shown(token: int) -> str:
        return str(token) if text is None else f"{text(token)} ({token})"

    return (
        f"after position {c.position} {a} goes on with {shown(c.a)}, {b} with {shown(c.b)}; their "
        f"logits lie {number(c.gap_a)} and {number(c.gap_b)} apart"
    )


@dataclass(frozen=True)
class Gate:
    """The cosine of every layer's output, against a least one."""

    least: float
    cosines: dict[int, float]
    """By layer; -1 where there is none: NaN, infinite, or zero on one side alone."""

    @property
    def below(self) -> list[int]:
        """Layers below it."""
        return [layer for layer, c in self.cosines.items() if not c >= self.least]

    def __str__(self) -> str:
        n, below = len(self.cosines), self.below
        line = f"cosine ≥ {self.least:g} at {n - len(below)} of {n} layers"
        named = ", ".join(f"layer {i} at {self.cosines[i]:.6g}" for i in below[:8])
        more = f" and {len(below) - 8} more" if len(below) > 8 else ""
        return f"{line}; below: {named}{more}" if below else line


def gate(diffs: Sequence[Diff], least: float) -> Gate:
    """The worst cosine of each layer's output over some comparisons.

    Raises NothingCompared where one of them has no layer's output.
    """
    cosines: dict[int, float] = {}
    for diff in diffs:
        found = False
        for s in diff.stages:
            if s.stage != OUTPUT or s.layer is None:
                continue
            found, d = True, s.distance
            broken = d.cosine is None or d.nonfinite_a or d.nonfinite_b or isnan(d.cosine)
            cosine = -1.0 if broken else float(d.cosine or 0.0)
            cosines[s.layer] = min(cosine, cosines.get(s.layer, 1.0))
        if not found:
            raise NothingCompared(f"cosine: expected {OUTPUT} of some layer in both runs, got none")
    return Gate(least, cosines)


def located(diff: Diff, text: Text | None, a: str = "A", b: str = "B") -> list[str]:
    """Where and what, most telling first: the first stage, what is faulty, experts, tokens."""
    lines = []
    if (first := diff.first) is not None:
        lines.append(f"first at {stage(first)}")
    if diff.faulty and diff.faulty[0] is not first:
        lines.append(f"faulty at {stage(diff.faulty[0])}")
    lines += [experts(c, a, b) for c in diff.router[:1]]
    lines += [flip(c, text, a, b) for c in diff.argmax[-1:]]
    return lines
