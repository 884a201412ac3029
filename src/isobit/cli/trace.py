"""``isobit trace``: record the values of a run's stages in a safetensors file."""

import argparse

from isobit.cli import options, say, tools
from isobit.cli.output import size
from isobit.verify import trace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    options.add_model(parser)
    options.add_prompt(parser, "-p", "--prompt", required=True)
    parser.add_argument(
        "--stages", default="all", metavar="NAME,…", help="stages to record (default: all)"
    )
    parser.add_argument(
        "--layers", default="all", metavar="A..B", help="layers, both included (default: all)"
    )
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="file to write")
    options.add_engine(parser)


def main(args: argparse.Namespace) -> None:
    """Run the command."""
    tokens = tools.prompt_tokens(args)
    with options.open_model(args, max(len(tokens), 1)) as model:
        stages = trace.parse_stages(args.stages, moe=model.config.is_moe)
        layers = trace.parse_layers(args.layers, model.config.n_layers)
        recorded = trace.record(model, tokens, stages, layers)
    recorded.save(args.output)
    keys = recorded.stages()
    nbytes = sum(recorded[key].nbytes for key in keys)
    m = recorded.manifest
    missing = f"; not held by {m.backend}: {', '.join(m.not_recorded)}" if m.not_recorded else ""
    say(
        f"wrote {args.output}: {len(keys)} tensors of {len(tokens)} tokens, {size(nbytes)}{missing}"
    )
