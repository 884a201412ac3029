"""``isobit replay``: compute receipts again, on any backend."""

import argparse
import sys

from isobit.cli import options, say, tools
from isobit.cli.output import busy, count
from isobit.errors import GateFailed
from isobit.runtime.model import Model
from isobit.verify.receipt import Difference, Receipt, replay
from isobit.verify.receipt_file import LIMIT, read_receipts, receipts_in


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "receipt",
        metavar="RECEIPT",
        help="written by isobit run --receipt; or what carries receipts: an answer of isobit "
        "serve, a stream of it as it came (curl -N), rows of isobit batch; - for standard input",
    )
    options.add_model(parser)
    options.add_engine(parser, bits=False, backend="cpu")


def main(args: argparse.Namespace) -> None:
    """Run the command."""
    if args.receipt == "-":
        found = receipts_in(sys.stdin.buffer.read(LIMIT + 1), "standard input")
    else:
        found = read_receipts(args.receipt)
    empty = sum(not receipt.tokens for _, receipt in found)
    if empty < len(found):  # else there is nothing to compare, and replay says so
        found = [(where, receipt) for where, receipt in found if receipt.tokens]
    receipts = [receipt for _, receipt in found]
    longest = max(len(receipt.prompt) + len(receipt.tokens) for receipt in receipts)
    bits = receipts[0].activation_bits  # another's is refused
    with tools.open_exactly(
        args.model, args.backend, bits, args.threads, longest, **options.sizes(args)
    ) as model:
        where = f"{model.backend.name} ({model.backend.device})"
        differ = _replayed(found, model)
    n = len(found)
    if differ:
        place, receipt, difference = differ[0]
        more = f"; {len(differ):,} of {n:,} receipts differ" if n > 1 else ""
        raise GateFailed(
            f"{place}, of {receipt.backend} ({receipt.device}): {where} differs, first at "
            f"{difference}{more}"
        )
    if empty:
        say(f"{count(empty, 'receipt')} without a token: nothing to compare")
    total = sum(len(receipt.tokens) for receipt in receipts)
    of = f" of {n:,} receipts" if n > 1 else ""
    print(f"identical: {count(total, 'token')}{of} on {where}")


def _replayed(
    found: list[tuple[str, Receipt]], model: Model
) -> list[tuple[str, Receipt, Difference]]:
    """Those that differ, with their places."""
    differ: list[tuple[str, Receipt, Difference]] = []
    total = sum(len(receipt.tokens) for _, receipt in found)
    done = 0
    with busy(f"computing {total:,} tokens again") as change:
        for i, (place, receipt) in enumerate(found):
            try:
                difference = replay(receipt, model)
            except KeyboardInterrupt:
                far = f"after {i:,} of {count(len(found), 'receipt')}"
                raise KeyboardInterrupt(f"{far}; {len(differ):,} differ") from None
            if difference is not None:
                differ.append((place, receipt, difference))
            done += len(receipt.tokens)
            change(f"computing again: {done:,} of {total:,} tokens")
    return differ
