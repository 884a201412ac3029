"""``isobit perplexity``: how well a model predicts a text."""

import argparse
import json

from isobit.cli import argtypes, options, prompt_options, tools
from isobit.cli.output import bar, count
from isobit.config import MOST_POSITIONS
from isobit.errors import UsageError
from isobit.verify.diff import finite
from isobit.verify.perplexity import Perplexity, perplexity


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = (
        "Perplexity of a text, cut into windows: of every token but a window's first, or with "
        "--llama as llama-perplexity counts, of the second half of each whole window."
    )
    options.add_model(parser)
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text; - for stdin")
    parser.add_argument(
        "--window",
        type=argtypes.at_least(4, MOST_POSITIONS),
        default=512,
        metavar="N",
        help="tokens of a window (default: %(default)s)",
    )
    parser.add_argument(
        "--limit", type=argtypes.at_least(2), metavar="N", help="take the first N tokens only"
    )
    parser.add_argument("--llama", action="store_true", help="llama-perplexity's definition")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    options.add_engine(parser)
    options.add_inexact(parser)


def main(args: argparse.Namespace) -> None:
    """Run the command."""
    ids = tools.text_tokens(args.model, prompt_options.read_text(args.text), special=False)[
        : args.limit
    ]
    if not ids:
        raise UsageError(f"{args.text}: expected a text, got an empty one")
    found: Perplexity | None = None
    with options.open_model(args, args.window) as model, bar("tokens") as step:
        words = model.tokenizer.vocabulary
        begin = words.bos_id if words.add_bos else None
        try:
            for now in perplexity(
                model, ids, args.window, second_half=args.llama, begin=begin, progress=step
            ):
                found = now
        except KeyboardInterrupt:
            if found is None:
                raise
            _print(args, found)
            windows = count(found.windows, "window")
            raise KeyboardInterrupt(f"after {windows} of {args.window}") from None
    assert found is not None
    _print(args, found)


def _print(args: argparse.Namespace, found: Perplexity) -> None:
    if args.json:
        report = {
            "perplexity": found.value,
            "error": found.error,
            "mean_nll": found.nll / found.tokens,
            "tokens": found.tokens,
            "windows": found.windows,
            "window": args.window,
            "definition": "second half of each window" if args.llama else "all but the first token",
            "by_window": found.by_window,
        }
        print(json.dumps(finite(report), allow_nan=False))
        return
    error = "" if found.error is None else f" ± {found.error:.4f}"
    which = "the second halves" if args.llama else "all tokens but the first"
    print(
        f"perplexity {found.value:.4f}{error}: {count(found.tokens, 'token')}, {which} of "
        f"{count(found.windows, 'window')} of {args.window}"
    )
