"""``isobit ablate``: measure the effect of another arithmetic on chosen operations."""

import argparse
import json
from dataclasses import asdict

from isobit.cli import options, tools
from isobit.cli.output import add_format, bar, busy, print_table
from isobit.errors import UsageError
from isobit.model.weights import Weights
from isobit.verify import other_arithmetics
from isobit.verify.ablate import OWN, Ablation, Outcome, by_share
from isobit.verify.compare import ONE_TOKEN
from isobit.verify.fit import Fit, in_words
from isobit.verify.trace import check_tokens
from isobit.verify.trace_file import parse_layers

_DROP = ("sets moved", "argmax moved", "of the spec's", "mean KL", "argmax", "expert sets", "±")
"""Columns that a narrow terminal does without, the first of them first."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    options.add_model(parser)
    tools.add_prompts(parser)
    parser.add_argument(
        "--stage",
        action="append",
        default=[],
        metavar="STAGE=ARITHMETIC",
        help=f"run a stage in {other_arithmetics.NAMES}; repeatable: each alone, then all together "
        "(unless a stage is named twice)",
    )
    parser.add_argument(
        "--rank",
        nargs="?",
        const=OWN,
        metavar="ARITHMETIC",
        help="rank what every stage does by itself: in the specification's arithmetic, or another, "
        "with all others exact and the oracle's experts in every layer",
    )
    parser.add_argument(
        "--pin",
        action="store_true",
        help="--stage too with the oracle's experts, so that other experts hide nothing",
    )
    parser.add_argument(
        "--layers", default="all", metavar="A..B", help="layers, both included (default: all)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    add_format(parser)
    options.add_activation_bits(parser, about="of the specification (default: %(default)s)")


def main(args: argparse.Namespace) -> None:
    """Run the command."""
    if not args.stage and args.rank is None:
        raise UsageError("expected --stage STAGE=ARITHMETIC or --rank, got neither")
    if args.rank not in (None, OWN):
        other_arithmetics.rounding(args.rank)
    prompts = tools.read_prompts(args)
    with tools.open_file(args.model) as file:
        weights = Weights.from_file(file)
    layers = parse_layers(args.layers, weights.config.n_layers)
    with busy("computing the prompts in float64 and by the specification"):
        checked = [check_tokens(p, weights.config) for p in prompts]
        ablation = Ablation(weights, checked, args.activation_bits // 8)
    choices = [ablation.parse(text) for text in args.stage]
    found = [ablation.specification]
    if args.pin:
        found.append(ablation.pinned_specification())
    whole = [] if args.rank is None else [ablation.everything()]
    tries: list[dict[str, str]] = [{stage: name} for stage, name in choices]
    if len(choices) > 1 and len(choices) == len(dict(choices)):
        tries.append(dict(choices))
    first, ranked, total = len(found), [], len(tries)
    fits: dict[str, Fit] = {}
    stopped = None
    try:
        with bar("runs") as step:
            for each in tries:
                found.append(ablation.try_out(each, layers, pinned=args.pin))
                step(len(found) - first, total)
        if args.rank is not None:
            total += len(ablation.stages)
            with bar("stages") as step:
                for outcome in ablation.rank(args.rank, layers):
                    ranked.append(outcome)
                    step(len(ranked), len(ablation.stages))
            if args.rank == OWN:
                fits = ablation.fits(layers)
    except KeyboardInterrupt:
        done = len(found) - first + len(ranked)
        stopped = KeyboardInterrupt(f"after {done} of {total} runs")
    _show(args, found, whole + by_share(ranked), fits, prompts)
    if stopped is not None:
        raise stopped


def _show(
    args: argparse.Namespace,
    found: list[Outcome],
    ranked: list[Outcome],
    fits: dict[str, Fit],
    prompts: list[list[int]],
) -> None:
    """Print what was tried, and the ranking, which is a table of its own."""
    shown = found + ranked
    if args.json:
        more = [
            {"share": o.share, "uncertainty": o.uncertainty}
            | ({"fit": asdict(fits[o.name])} if o.name in fits else {})
            for o in shown
        ]
        print(json.dumps([asdict(o) | m for o, m in zip(shown, more, strict=True)]))
        return
    header = ["run", "share gone", "±", "logits rel. RMS", "of the spec's", "mean KL"]
    header += ["expert sets", "argmax", "sets moved", "argmax moved"]
    if args.stage:
        print_table(header, [_cells(o) for o in found], args.format, drop=_DROP)
    if ranked:
        print("\n" * bool(args.stage), end="")
        rows = [_cells(o)[:8] for o in (found[0], *ranked)]
        rows[0][1:3] = "--"  # with experts of its own it is no sum of stages
        print_table(["stage alone", "share", *header[2:8]], rows, args.format, drop=_DROP)
    for line in in_words(list(fits.items())):
        print(f"fits: {line}")
    for line in _notes(shown, prompts):
        print(line)


def _cells(o: Outcome) -> list[str]:
    would = "would be " if o.pinned else ""
    return [
        o.name,
        _share(o.share),
        "-" if o.uncertainty is None else _share(o.uncertainty).removesuffix(" %"),
        f"{o.relative_rms:.3g}",
        f"{o.factor:.4g} x",
        f"{o.mean_kl:.3g}",
        f"{would}{o.changed_sets} of {o.token_layers}",
        f"{o.argmax_changed} of {o.tokens}",
        str(o.sets_moved),
        str(o.argmax_moved),
    ]


def _share(share: float) -> str:
    """In percent, without a minus before a zero; far beyond the whole as a multiple of it."""
    return f"{share:.3g} x" if abs(share) >= 10 else f"{round(100 * share, 1) + 0:.1f} %"


def _notes(found: list[Outcome], prompts: list[list[int]]) -> list[str]:
    """How to read the tables."""
    lines = []
    if any(o.alone for o in found):
        lines.append(
            "alone: every other stage is exact, so that a share is what the stage does by itself; "
            "where errors meet, shares do not add up to all of it"
        )
    if any(o.pinned for o in found):
        lines.append(
            "pinned: every layer takes the oracle's experts; those that a run would have taken are "
            "counted under expert sets"
        )
    if len(prompts) == 1:
        lines.append("one prompt: a share has no uncertainty; give several with --prompts FILE")
    else:
        lines.append(f"±: twice the standard error over {len(prompts)} prompts")
    if any(len(p) == 1 for p in prompts):
        lines.append(f"note: {ONE_TOKEN}")
    return lines
