"""``isobit ablate``: what a guess about an operation's arithmetic is worth."""

import argparse
import json
from dataclasses import asdict

from isobit.cli import options, tools
from isobit.cli.output import markdown, progress_bar
from isobit.errors import UsageError
from isobit.model.weights import Weights
from isobit.verify import coarse
from isobit.verify.ablate import Ablation, Outcome
from isobit.verify.trace import check_tokens, parse_layers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    options.add_model(parser)
    options.add_prompt(parser, "-p", "--prompt", required=True)
    parser.add_argument(
        "--stage",
        action="append",
        default=[],
        metavar="STAGE=ARITHMETIC",
        help=f"run a stage in {coarse.NAMES}; repeatable: each alone, then all together (unless a "
        "stage is named twice)",
    )
    parser.add_argument(
        "--rank",
        nargs="?",
        const="f64",
        metavar="ARITHMETIC",
        help="try every stage in an arithmetic (default: f64) and rank their shares of the error",
    )
    parser.add_argument(
        "--layers", default="all", metavar="A..B", help="layers, both included (default: all)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument(
        "--planes", type=int, default=2, metavar="N", help="of the specification (default: 2)"
    )


def main(args: argparse.Namespace) -> None:
    """Run the command."""
    if not args.stage and args.rank is None:
        raise UsageError("expected --stage STAGE=ARITHMETIC or --rank, got neither")
    if args.planes not in (1, 2):
        raise UsageError(f"--planes: expected 1 or 2, got {args.planes}")
    if args.rank is not None:
        coarse.rounding(args.rank)
    tokens = tools.prompt_tokens(args)
    with tools.open_file(args.model) as file:
        weights = Weights.from_file(file)
    layers = parse_layers(args.layers, weights.config.n_layers)
    ablation = Ablation(weights, check_tokens(tokens, weights.config), args.planes)
    choices = [ablation.parse(text) for text in args.stage]
    found = [ablation.specification]
    found += [ablation.try_out({stage: name}, layers) for stage, name in choices]
    if len(choices) > 1 and len(choices) == len(dict(choices)):
        found.append(ablation.try_out(dict(choices), layers))
    if args.rank is not None:
        with progress_bar() as bar:
            task = bar.add_task("stages", total=None)

            def progress(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total)
                bar.refresh()

            found += ablation.rank(args.rank, layers, progress)
    if args.json:
        print(json.dumps([asdict(o) | {"share": o.share} for o in found]))
    else:
        header = [
            "run",
            "logits rel. RMS",
            "of the spec's",
            "share gone",
            "mean KL",
            "expert sets",
            "argmax",
        ]
        header += ["sets moved", "argmax moved"]
        print(markdown(header, [_cells(o, len(tokens)) for o in found]))


def _cells(o: Outcome, tokens: int) -> list[str]:
    return [
        o.name,
        f"{o.relative_rms:.3g}",
        f"{o.factor:.4g} x",
        f"{100 * o.share:.1f} %",
        f"{o.mean_kl:.3g}",
        f"{o.changed_sets} of {o.token_layers}",
        f"{o.argmax_changed} of {tokens}",
        str(o.sets_moved),
        str(o.argmax_moved),
    ]
