"""``isobit convert``: write a checkpoint of transformers as a GGUF file."""

import argparse

from isobit.cli import argtypes, say
from isobit.cli.output import progress_bar
from isobit.convert import convert
from isobit.model.checkpoint import TYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "folder", metavar="FOLDER", help="config.json, tokenizer.json and safetensors files"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=argtypes.whole_file,
        required=True,
        metavar="FILE",
        help="file to write",
    )
    parser.add_argument(
        "--type",
        default="bf16",
        metavar="TYPE",
        help=f"of the matrices: {', '.join(TYPES)} (default: %(default)s); K-quants are "
        "llama-quantize's, from bf16",
    )


def main(args: argparse.Namespace) -> None:
    """Run the command."""
    with progress_bar() as bar:
        task = bar.add_task("convert")

        def step(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, refresh=True)

        convert(args.folder, args.output, args.type, step)
    say(f"wrote {args.output}; llama-quantize makes K-quants of a bf16 file")
