"""``isobit verify``: compare a backend with another, the oracle, or transformers."""

import argparse
from contextlib import ExitStack

from isobit.cli import options, tools
from isobit.cli.output import progress_bar
from isobit.errors import NothingCompared, UsageError
from isobit.runtime.model import Model
from isobit.verify.trace import ModelRun, Recordable, parse_layers
from isobit.verify.verify import verify


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    options.add_model(parser)
    options.add_prompt(parser, "-p", "--prompt", required=True)
    parser.add_argument(
        "--against",
        default="reference",
        metavar="NAME",
        help="a backend, to compare bits; or oracle (float64) or hf (transformers), which say how "
        "accurate it is (default: %(default)s)",
    )
    parser.add_argument(
        "--against-planes", type=int, metavar="N", help="its planes (default: the same)"
    )
    options.add_engine(parser, backend="cpu")
    tools.add_report(parser)


def main(args: argparse.Namespace) -> None:
    """Run the command."""
    tokens = tools.prompt_tokens(args)
    if len(tokens) < 2:
        raise NothingCompared(f"tokens: expected at least 2 to compare, got {len(tokens)}")
    n = len(tokens)
    with ExitStack() as stack:
        x = tools.open_exactly(args.model, args.backend, args.activation_planes, args.threads, n)
        stack.enter_context(x)
        layers = None if args.layers == "all" else parse_layers(args.layers, x.config.n_layers)
        y = _against(args, x, n)
        if isinstance(y, ModelRun):
            stack.enter_context(y.model)
        bar = stack.enter_context(progress_bar())
        task = bar.add_task("layers", total=x.config.n_layers)

        def progress(stage: str, layer: int | None) -> None:
            if layer is not None and stage == "post_ffn_residual":
                bar.update(task, completed=layer + 1)
                bar.refresh()

        diff = verify(x, y, tokens, layers, progress, histograms=bool(args.html))
    tools.show(diff, args)


def _against(args: argparse.Namespace, x: Model, context: int) -> Recordable:
    planes = args.against_planes
    other = tools.foreign_run(args.against, x.file)
    if other is not None:
        if planes is not None:
            raise UsageError(f"--against-planes: expected a backend's, {args.against} has none")
        return other
    if args.against == "auto":
        raise UsageError("--against: expected the name of a backend, oracle or hf; got 'auto'")
    planes = args.activation_planes if planes is None else planes
    return ModelRun(tools.open_exactly(args.model, args.against, planes, args.threads, context))
