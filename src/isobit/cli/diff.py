"""``isobit diff``: compare two traces."""

import argparse
from pathlib import Path

from isobit.cli import tools
from isobit.errors import NothingCompared
from isobit.verify.compare import compare
from isobit.verify.trace_file import Trace, parse_layers, parse_stages
from isobit.verify.verify import open_replay


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("a", metavar="A", help="a trace")
    parser.add_argument("b", metavar="B", help="the trace it is measured against")
    parser.add_argument(
        "--stages", metavar="NAME,…", help="stages to compare (default: all that were recorded)"
    )
    parser.add_argument(
        "--replay",
        nargs="?",
        const="sample",
        metavar="MODEL",
        help="compute each stage that differs again from what its own run recorded before it, as "
        "B computes: is it faulty or propagated? (MODEL without a name is the default: sample)",
    )
    tools.add_report(parser)
    tools.add_cosine(parser)


def main(args: argparse.Namespace) -> None:
    """Run the command."""
    a, b = Trace.load(args.a), Trace.load(args.b)
    if Path(args.a).samefile(args.b):
        raise NothingCompared(f"expected two traces, got {args.a} twice: it equals itself")
    recorded = a.stages() + b.stages()
    names = list(dict.fromkeys(stage for stage, _ in recorded))
    stages = None if args.stages is None else parse_stages(args.stages, names)
    n_layers = max((layer for _, layer in recorded if layer is not None), default=-1) + 1
    layers = None if args.layers == "all" else parse_layers(args.layers, n_layers)
    replay = None if args.replay is None else open_replay(args.replay, b.manifest)
    text = None if args.replay is None else tools.token_texts(args.replay)
    diff = compare(a, b, stages, layers, replay, histograms=bool(args.html))
    tools.show(diff, args, text, (args.a, args.b))
