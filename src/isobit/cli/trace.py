"""``isobit trace``: record the values of a run's stages in a safetensors file."""

import argparse
from contextlib import ExitStack

from isobit.cli import options, prompt_options, say, tools
from isobit.cli.output import busy, count, size
from isobit.verify import trace
from isobit.verify.trace_file import Trace, parse_layers, parse_stages


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = (
        "Record the values of a run's stages in a safetensors file. --backend can also be oracle "
        "(float64) or hf (transformers)."
    )
    options.add_model(parser)
    prompt_options.add_prompt(parser, "-p", "--prompt", required=True)
    parser.add_argument(
        "--stages", default="all", metavar="NAME,…", help="stages to record (default: all)"
    )
    parser.add_argument(
        "--layers", default="all", metavar="A..B", help="layers, both included (default: all)"
    )
    tools.add_output(parser)
    options.add_engine(parser)
    options.add_inexact(parser)


def main(args: argparse.Namespace) -> None:
    """Run the command."""
    tokens = tools.prompt_tokens(args)
    with ExitStack() as stack:
        file = stack.enter_context(tools.open_file(args.model))
        source = tools.foreign_run(args.backend, file)
        if source is None:
            model = stack.enter_context(options.open_model(args, max(len(tokens), 1)))
            source = trace.ModelRun(model)
        stages = parse_stages(args.stages, source.graph.names)
        layers = parse_layers(args.layers, source.config.n_layers)
        with busy(f"recording {count(len(tokens), 'token')}"):
            recorded = trace.record(
                source, tokens, stages, layers, interrupted=lambda t: _save(t, args.output)
            )
    _save(recorded, args.output)


def _save(recorded: Trace, path: str) -> None:
    """Write a trace, and say what it holds."""
    recorded.save(path)
    keys, m = recorded.stages(), recorded.manifest
    held = sum(recorded[key].nbytes for key in keys)
    of = "" if len(m.positions) == len(m.tokens) else f"{len(m.positions):,} of "
    missing = f"; not held by {m.backend}: {', '.join(m.not_recorded)}" if m.not_recorded else ""
    tokens = count(len(m.tokens), "token")
    say(f"wrote {path}: {count(len(keys), 'tensor')} of {of}{tokens}, {size(held)}{missing}")
