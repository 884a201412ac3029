"""A difference for people: sentences, a table, and one HTML file that needs no network."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from itertools import groupby

from isobit.verify import blame
from isobit.verify.diff import Diff, StageDiff
from isobit.verify.histogram import LARGEST, SMALLEST
from isobit.verify.metrics import Distance, WorstValue
from isobit.verify.trace_file import Manifest

Table = tuple[list[str], list[list[str]]]
_CAUSES = {
    "near-tie": "by a near-tie",
    "error": "by error",
    "selection": "chosen against the logits",
    "unknown": "for an unknown reason",
}
_TEXTS = 2000
"""Tokens of a prompt whose texts a page shows."""


def summary(diff: Diff, text: blame.Text | None = None) -> list[str]:
    """What is to be said about a difference, most important first; one sentence a line.

    ``text`` gives a token's text.
    """
    lines = [_verdict(diff), f"A is {_run(diff.a)}; B is {_run(diff.b)}"]
    origins = Counter(s.origin for s in diff.stages)
    if diff.faulty and not diff.floats:
        rest = f"the rest is propagated ({origins['propagated']} stages)"
        lines.append(f"replay: faulty {_places(diff.faulty)}; {rest}")
    elif origins["propagated"] and not diff.floats:
        lines.append("replay: no faulty operation among the stages compared")
    if origins["not replayed"]:
        lines.append(f"replay: {origins['not replayed']} stages lack the inputs to replay them")
    furthest = max(diff.stages, key=lambda s: _largest_own([s]) or 0.0)
    if (line := blame.beyond(diff)) is not None:
        lines.append(f"replay: {line}")
    lines += [f"replay: {line}" for line in blame.fits(diff)]
    if off := _largest_own([furthest]):
        lines.append(
            f"replay: furthest off by itself is {furthest.where}: relative RMS {blame.number(off)}"
        )
    lines += _router(diff) + _next_token(diff, text)
    apart = diff.apart()
    for s, times in sorted(apart, key=lambda pair: -pair[1])[:5]:
        lines.append(f"stands apart: {s.where}, {times:.3g} times the median of its stage")
    if len(apart) > 5:
        lines.append(f"stands apart: {len(apart) - 5} more")
    if diff.not_compared:
        lines.append(f"not compared (one side does not hold it): {', '.join(diff.not_compared)}")
    return lines + [f"note: {note}" for note in diff.notes]


def _run(m: Manifest) -> str:
    bits = "" if m.activation_bits is None else f", {m.activation_bits}-bit activations"
    return f"{m.backend}{bits} ({m.device})" if m.device else m.backend + bits


def _verdict(diff: Diff) -> str:
    values = sum(s.distance.values for s in diff.stages)
    tokens = f"{diff.tokens} of " if diff.tokens != len(diff.a.tokens) else ""
    scope = f"{len(diff.stages)} stages, {values} values, {tokens}{len(diff.a.tokens)} tokens"
    if diff.accuracy:
        last = diff.stages[-1]
        return (
            f"accuracy of {diff.a.backend} against {diff.b.backend} over {scope}: "
            f"{last.where}: cosine {blame.number(last.distance.cosine, 9)}, "
            f"relative RMS {blame.number(last.distance.relative_rms)}{_nonfinite(last.distance)}"
        )
    first = diff.first
    if first is None:
        odd = sum(s.distance.nonfinite_a for s in diff.stages)
        return f"identical: {scope}{f'; {odd} values are NaN or infinite' if odd else ''}"
    d = first.distance
    differing = sum(not s.distance.identical for s in diff.stages)
    return (
        f"different: {differing} of {scope}; the first is {first.where} "
        f"(from position {d.first_position}): {d.differing} of {d.values} values, "
        f"{'' if d.max_ulp is None else f'up to {d.max_ulp} ulp, '}"
        f"largest difference {blame.number(d.max_abs)}, cosine {blame.number(d.cosine, 9)}, "
        f"relative RMS {blame.number(d.relative_rms)}{_nonfinite(d)}"
    )


def _nonfinite(d: Distance) -> str:
    if not d.nonfinite_a and not d.nonfinite_b:
        return ""
    return f" without {d.nonfinite_a} and {d.nonfinite_b} values that are NaN or infinite"


def _router(diff: Diff) -> list[str]:
    if not diff.router_rows:
        return []
    causes = ", ".join(f"{n} {_CAUSES[c]}" for c, n in diff.router_causes.most_common())
    line = f"experts: {diff.router_changed} of {diff.router_rows} expert sets differ"
    line += f" ({causes})" if causes else ""
    line += f"; {diff.router_reordered} differ only in order" if diff.router_reordered else ""
    lines = [line]
    return lines + [f"  {blame.experts(c)}" for c in diff.router[:3]]


def _next_token(diff: Diff, text: blame.Text | None) -> list[str]:
    lines = []
    if diff.logit_rows:
        line = f"next token: argmax changed at {diff.argmax_changed} of {diff.logit_rows} positions"
        line += f"; KL(B‖A) mean {blame.number(diff.mean_kl)}, largest {blame.number(diff.kl_max)}"
        lines += [line, *(f"  {blame.flip(c, text)}" for c in diff.argmax[:3])]
    if diff.nonfinite_rows:
        lines.append(f"next token: logits with NaN or infinity at {diff.nonfinite_rows} positions")
    return lines


def _others(n: int) -> str:
    return f"{n} other stages only pass" if n > 1 else "1 other stage only passes"


def _places(stages: Sequence[StageDiff]) -> str:
    """Faulty stages, those of the same layers together: "a and b of layers 0-7; c [in B]"."""
    layers: dict[str, list[int]] = {}
    sides: dict[str, set[str]] = {}
    for s in stages:
        layers.setdefault(s.stage, []).extend([] if s.layer is None else [s.layer])
        sides.setdefault(s.stage, set()).add(str(s.origin).removeprefix("faulty").strip())
    together: dict[str, list[str]] = {}
    for name, found in layers.items():
        side = ", ".join(sorted(sides[name] - {""}))
        together.setdefault(_ranges(found), []).append(f"{name} [{side}]" if side else name)
    parts = []
    for numbers, names in together.items():
        several = "s" if "," in numbers or "-" in numbers else ""
        of = f" of layer{several} {numbers}" if numbers else ""
        parts.append(" and ".join(filter(None, (", ".join(names[:-1]), names[-1]))) + of)
    return "; ".join(parts)


def _ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 as "0-2, 5"."""
    runs = []
    for _, group in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        run = [n for _, n in group]
        runs.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ", ".join(runs)


def table(diff: Diff, *, every: bool = False) -> Table:
    """Header and rows: a row for each stage, the worst of its layers; or for each layer too."""
    header = [
        "stage",
        "layers",
        "differing",
        "max ulp",
        "max |A-B|",
        "cosine",
        "rel. RMS",
        "NaN/Inf",
    ]
    origins = any(s.origin is not None for s in diff.stages)
    own = any(s.own_error is not None for s in diff.stages)
    header += ["origin"] * origins + ["own rel. RMS"] * own
    groups: list[list[StageDiff]] = []
    for s in diff.stages:
        if every or not (found := [g for g in groups if g[0].stage == s.stage]):
            groups.append([s])
        else:
            found[0].append(s)
    rows = []
    for group in groups:
        row = _row(group, accuracy=diff.accuracy, every=every)
        row += [", ".join(sorted({s.origin for s in group if s.origin}))] * origins
        rows.append(row + [blame.number(_largest_own(group), 2)] * own)
    return header, rows


def _largest_own(group: Sequence[StageDiff]) -> float | None:
    own = [s.own_error.relative_rms for s in group if s.own_error is not None]
    return max((x for x in own if x is not None), default=None)


def _row(group: Sequence[StageDiff], *, accuracy: bool, every: bool) -> list[str]:
    d = [s.distance for s in group]
    wrong = [s for s in group if not s.distance.identical]
    if every:
        layers = "" if group[0].layer is None else str(group[0].layer)
    elif not wrong or accuracy:
        layers = "" if group[0].layer is None else f"all {len(group)}"
    else:
        layers = _ranges([s.layer for s in wrong if s.layer is not None])
    ulps = [x.max_ulp for x in d]
    rms = [x.relative_rms for x in d]
    cosines = [x.cosine for x in d if x.cosine is not None]
    bad = sum(x.nonfinite_a + x.nonfinite_b for x in d)
    differing = sum(x.differing for x in d)
    return [
        group[0].stage,
        layers,
        f"{differing} of {sum(x.values for x in d)}" if differing or accuracy else "identical",
        "-" if None in ulps else str(max(u for u in ulps if u is not None)),
        blame.number(max(x.max_abs for x in d), 2) if d[0].numbers else "-",
        blame.number(min(cosines), 8) if cosines else "-",
        "-" if None in rms else blame.number(max(x for x in rms if x is not None), 2),
        str(bad) if bad else "",
    ]


def worst_values(diff: Diff, n: int = 20) -> list[tuple[StageDiff, WorstValue]]:
    """The values furthest apart, of each stage and layer at most five."""
    found = [(s, w) for s in diff.stages if s.distance.numbers for w in s.distance.worst]
    return sorted(found, key=lambda pair: -abs(pair[1].a - pair[1].b))[:n]


def answer(diff: Diff) -> str:
    """What a comparison found, in one sentence."""
    replayed = any(s.origin is not None or s.own_error is not None for s in diff.stages)
    if diff.accuracy:
        last = diff.stages[-1]
        line = f"{diff.a.backend} is off by {blame.number(last.distance.relative_rms)} in "
        line += f"{last.where} (relative RMS, against {diff.b.backend})"
        furthest = max(diff.stages, key=lambda s: _largest_own([s]) or 0.0)
        if off := _largest_own([furthest]):
            line += f"; furthest off by itself is {furthest.where}: {blame.number(off)}"
        return line + "."
    first = diff.first
    if first is None:
        values = sum(s.distance.values for s in diff.stages)
        return f"Identical: every bit of {values:,} values in {len(diff.stages)} stages."
    if diff.floats:
        explained = f"The runs part at {first.where}; float32 rounding explains every operation."
        beyond = f"Beyond float32 rounding by itself: {_places(diff.beyond)}."
        return beyond if diff.beyond else explained
    if diff.faulty:
        passed = sum(s.origin == "propagated" for s in diff.stages)
        rest = "" if not passed else f". {_others(passed)} an error on"
        return f"Wrong by itself: {_places(diff.faulty)}{rest}."
    if replayed:
        return f"The runs part at {first.where}, and no operation compared is wrong by itself."
    return (
        f"The runs part at {first.where}, position {first.distance.first_position}. Nothing was "
        "replayed: isobit diff --replay tells which operation is to blame."
    )


def html(diff: Diff, text: blame.Text | None = None, names: tuple[str, str] | None = None) -> str:
    """One self-contained page. ``text`` gives a token's text; ``names``: what A and B are called,
    such as their files."""
    shown = {*diff.a.tokens[:_TEXTS], *(t for c in diff.argmax for t in (c.a, c.b))}
    data = diff.to_json() | {
        "answer": answer(diff),
        "summary": summary(diff, text),
        "accuracy": diff.accuracy,
        "names": names or ("", ""),
        "texts": {} if text is None else {t: text(t) for t in sorted(shown)},
        "flow": {layer: diff.flow[layer] for layer in sorted(diff.flow)},
        "margins": diff.margins,
        "parted": [[layer, position, s] for (layer, position), s in diff.parted.items()],
        "difference_range": [SMALLEST, LARGEST],
        "worst": [[s.stage, s.layer, *w.shown()] for s, w in worst_values(diff)],
    }
    for entry, s in zip(data["stages"], diff.stages, strict=True):
        # Of experts' numbers the table says which, of values how their bits differ.
        entry["worst"] = [w.shown() for w in s.distance.worst] if s.distance.numbers else []
        if s.histogram is not None:
            entry["histogram"] = asdict(s.histogram)
    found = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    files = resources.files("isobit.verify")
    page, pictures = (
        files.joinpath(name).read_text("utf-8") for name in ("report.html", "pictures.js")
    )
    return page.replace("/*PICTURES*/", pictures).replace("/*DATA*/null", found)
