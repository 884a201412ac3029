"""``isobit import-trace``: turn another engine's APRT folder into a trace."""

import argparse

from isobit.cli import options, prompt_options, say, tools
from isobit.model.weights import Weights
from isobit.verify.aprt import read_folder
from isobit.verify.trace import check_tokens


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("folder", metavar="FOLDER", help="<stage>.bin, layer-<n>/<stage>.bin")
    options.add_model(parser)
    prompt_options.add_prompt(parser, "-p", "--prompt", required=True)
    parser.add_argument(
        "--last", action="store_true", help="the files hold the last token alone, not all of them"
    )
    parser.add_argument(
        "--engine", default="imported", metavar="NAME", help="what to call the engine in reports"
    )
    tools.add_output(parser)


def main(args: argparse.Namespace) -> None:
    """Run the command."""
    tokens = tools.prompt_tokens(args)
    with tools.open_file(args.model) as file:
        weights = Weights.from_file(file)
        check_tokens(tokens, weights.config)
        trace = read_folder(
            args.folder,
            tokens,
            last=args.last,
            engine=args.engine,
            graph=weights.graph,
            note=say,
        )
    trace.save(args.output)
    say(f"wrote {args.output}: {len(trace.stages())} tensors of {len(tokens)} tokens")
