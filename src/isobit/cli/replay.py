"""``isobit replay``: compute a receipt again, on any backend."""

import argparse

from isobit.cli import options, tools
from isobit.cli.output import busy
from isobit.errors import GateFailed
from isobit.verify.receipt import Receipt, replay


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("receipt", metavar="RECEIPT", help="written by isobit run --receipt")
    options.add_model(parser)
    options.add_engine(parser, planes=False, backend="cpu")


def main(args: argparse.Namespace) -> None:
    """Run the command."""
    receipt = Receipt.load(args.receipt)
    n = len(receipt.prompt) + len(receipt.tokens)
    planes = receipt.activation_planes
    with tools.open_exactly(
        args.model, args.backend, planes, args.threads, n, **options.sizes(args)
    ) as model:
        with busy(f"computing {len(receipt.tokens):,} tokens again"):
            difference = replay(receipt, model)
        where = f"{model.backend.name} ({model.backend.device})"
    if difference is not None:
        source = f"{receipt.backend} ({receipt.device})"
        raise GateFailed(f"receipt of {source}: {where} differs, first at {difference}")
    print(f"identical: {len(receipt.tokens)} tokens on {where}")
