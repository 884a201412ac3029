"""``isobit accuracy``: what the arithmetic costs against the float64 oracle, over a text."""

import argparse
import json
from contextlib import ExitStack
from dataclasses import asdict

from isobit.cli import argtypes, options, prompt_options, tools
from isobit.cli.output import add_format, bar, print_table
from isobit.config import MOST_POSITIONS
from isobit.verify import accuracy
from isobit.verify.accuracy import Accuracy
from isobit.verify.diff import finite
from isobit.verify.oracle import Oracle


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    options.add_model(parser)
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text; - for stdin")
    parser.add_argument(
        "--activation-bits",
        type=lambda text: argtypes.comma_list(text, "activation bits: expected 8, 16 or 16,8"),
        default=[16, 8],
        metavar="N,…",
        help="bits of activations to measure (default: 16,8)",
    )
    options.add_planes(parser, "--planes", several=True)
    parser.add_argument(
        "--window",
        type=argtypes.at_least(2, MOST_POSITIONS),
        default=accuracy.WINDOW,
        metavar="N",
        help="tokens of a sequence (default: %(default)s)",
    )
    parser.add_argument(
        "--limit", type=argtypes.at_least(2), metavar="N", help="measure the first N tokens only"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    add_format(parser)
    options.add_engine(parser, bits=False, backend="cpu")


def main(args: argparse.Namespace) -> None:
    """Run the command."""
    ids = tools.text_tokens(args.model, prompt_options.read_text(args.text))[: args.limit]
    with ExitStack() as stack:
        models = [
            stack.enter_context(
                tools.open_exactly(
                    args.model,
                    args.backend,
                    bits,
                    args.threads,
                    args.window,
                    **options.sizes(args),
                )
            )
            for bits in args.activation_bits
        ]
        progress = stack.enter_context(bar("tokens"))
        oracle = Oracle.of(models[0].file)
        found = accuracy.measure(
            models, oracle, ids, args.window, progress, lambda found: _show(args, found)
        )
    _show(args, found)


def _show(args: argparse.Namespace, found: list[Accuracy]) -> None:
    if args.json:
        print(json.dumps(finite([_row(a) for a in found]), allow_nan=False))
    else:
        header = ["activations", "tokens", "mean KL", "top-1 kept", "changed expert sets"]
        header += ["perplexity", "oracle's"]
        print_table(header, [_cells(a) for a in found], args.format, drop=["tokens"])


def _row(a: Accuracy) -> dict[str, object]:
    return asdict(a) | {
        "activation_planes": a.activation_bits // 8,  # its former name, for a release
        "mean_kl": a.mean_kl,
        "top1_fraction": a.top1_fraction,
        "changed_fraction": a.changed_fraction,
        "perplexity": a.perplexity,
        "oracle_perplexity": a.oracle_perplexity,
    }


def _cells(a: Accuracy) -> list[str]:
    changed = a.changed_fraction
    return [
        f"{a.backend}, {a.activation_bits} bits",
        str(a.tokens),
        f"{a.mean_kl:.2e}",
        f"{100 * a.top1_fraction:.2f} %",
        "-" if changed is None else f"{100 * changed:.3f} % of {a.token_layers}",
        f"{a.perplexity:.6g}",
        f"{a.oracle_perplexity:.6g}",
    ]
