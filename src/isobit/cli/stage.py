"""``isobit stage``: some layers of a model, for whoever asks: a stage of a pipeline of machines."""

import argparse
from functools import partial

from isobit.backends import open_backend
from isobit.backends.distributed.pipeline import LocalStage
from isobit.backends.distributed.remote import serve
from isobit.cli import argtypes, options, say
from isobit.cli.output import busy
from isobit.config import EngineConfig
from isobit.model.checkpoint import open_model
from isobit.model.weights import Weights
from isobit.runtime.model import locate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    options.add_model(parser)
    parser.add_argument(
        "--layers", type=_cut, required=True, metavar="FIRST:END", help="layers FIRST … END - 1"
    )
    parser.add_argument(
        "--listen",
        default="127.0.0.1:0",
        metavar="HOST:PORT",
        help="where to be asked; port 0 takes any that is free (default: %(default)s)",
    )
    options.add_stage_key(parser)
    parser.add_argument("--backend", default="auto", help="(default: %(default)s)")
    options.add_activation_bits(parser)
    parser.add_argument("-t", "--threads", type=argtypes.whole, metavar="N")
    parser.add_argument(
        "--sequences",
        type=argtypes.at_least(1),
        default=EngineConfig.max_sequences,
        metavar="N",
        help="so many of full length have room in the KV cache (default: %(default)s)",
    )
    options.add_sizes(parser)
    options.add_context(parser)


def main(args: argparse.Namespace) -> None:
    """Run the command."""
    key = options.stage_key(args.stage_key_env)
    engine = EngineConfig(
        activation_bits=args.activation_bits,
        threads=args.threads,
        context=args.context,
        **options.sizes(args, spread=False),
    )
    with open_model(locate(args.model, say)) as file:
        with busy(f"loading {args.model}"):
            make = partial(open_backend, args.backend, note=say)
            stage = LocalStage(make, Weights.from_file(file), engine, args.layers)
        try:
            serve(
                stage,
                args.listen,
                key,
                lambda at: say(
                    f"layers {args.layers[0]}:{args.layers[1]} on {stage.about.device} at {at}"
                ),
            )
        finally:
            stage.close()


def _cut(text: str) -> tuple[int, int]:
    first, _, end = text.partition(":")
    if not first.isdecimal() or not end.isdecimal():
        raise argparse.ArgumentTypeError(f"expected FIRST:END, such as 0:24; got {text!r:.40}")
    return int(first), int(end)
