"""``isobit replay``: compute a receipt again, on any backend."""

import argparse

from isobit.cli import options, tools
from isobit.cli.output import busy
from isobit.errors import GateFailed
from isobit.verify.receipt import Receipt, replay


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "receipt",
        metavar="RECEIPT",
        help="written by isobit run --receipt, or an answer of isobit serve that carries receipts",
    )
    options.add_model(parser)
    options.add_engine(parser, bits=False, backend="cpu")


def main(args: argparse.Namespace) -> None:
    """Run the command."""
    receipts = Receipt.load_all(args.receipt)
    n = max(len(receipt.prompt) + len(receipt.tokens) for receipt in receipts)
    total = sum(len(receipt.tokens) for receipt in receipts)
    bits = receipts[0].activation_bits  # another's is refused
    with tools.open_exactly(
        args.model, args.backend, bits, args.threads, n, **options.sizes(args)
    ) as model:
        with busy(f"computing {total:,} tokens again"):
            differences = [replay(receipt, model) for receipt in receipts]
        where = f"{model.backend.name} ({model.backend.device})"
    for i, (receipt, difference) in enumerate(zip(receipts, differences, strict=True)):
        if difference is not None:
            which = f"receipt {i + 1} of {len(receipts)}" if len(receipts) > 1 else "receipt"
            source = f"{which}, of {receipt.backend} ({receipt.device})"
            raise GateFailed(f"{source}: {where} differs, first at {difference}")
    print(f"identical: {total} tokens on {where}")
