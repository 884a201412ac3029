"""``isobit batch``: answer a file of requests, each with a receipt; check a share elsewhere."""

import argparse
import asyncio
from pathlib import Path
from typing import Any

from isobit.cli import options, say, tools
from isobit.cli.output import bar, count
from isobit.errors import GateFailed, UsageError
from isobit.runtime.scheduler import Limits
from isobit.verify.receipt import Receipt, replay


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "prompts",
        metavar="PROMPTS",
        help="requests, one a line, as OpenAI's batches have them: custom_id, url, body",
    )
    options.add_model(parser)
    parser.add_argument(
        "-o",
        "--output",
        type=options.output_file,
        metavar="OUT",
        required=True,
        help="answers, one a line; rows that it has already are not asked for again",
    )
    group = parser.add_argument_group("batch")
    group.add_argument(
        "--at-once",
        type=options.at_least(1),
        default=64,
        metavar="N",
        help="requests that are answered together (default: %(default)s)",
    )
    group.add_argument(
        "--no-receipts", action="store_true", help="leave out the receipt of every answer"
    )
    group.add_argument(
        "--audit",
        type=options.share,
        default=0.0,
        metavar="SHARE",
        help="compute this share of the rows again on --audit-backend, and compare: 0.01",
    )
    group.add_argument(
        "--audit-backend",
        default="reference",
        help="(default: %(default)s, the specification: slow)",
    )
    options.add_context(parser)
    options.add_engine(parser, sequences=4)
    options.add_inexact(parser)


def main(args: argparse.Namespace) -> None:
    """Run the command."""
    try:
        from isobit.server import batch  # noqa: PLC0415  # an extra
        from isobit.server.app import build  # noqa: PLC0415
        from isobit.server.service import Service  # noqa: PLC0415
    except ImportError as error:
        raise UsageError(f"{error.name}: not installed: pip install 'isobit[serve]'") from None
    if args.audit and args.no_receipts:
        raise UsageError("--audit: expected receipts to compute again, got --no-receipts")
    path = Path(args.prompts)
    rows = batch.read_rows(path)
    with options.open_model(args, args.context) as model:
        limits = Limits(pass_tokens=max(model.engine.chunk, Limits.running), waiting=args.at_once)
        with Service(model, limits=limits) as service:
            answered = batch.Answered(Path(args.output), service.fingerprint)
            known = {row.custom_id for row in rows}
            before = len(known & answered.done.keys())
            if before:
                say(f"{count(before, 'row')} of {len(rows):,} finished before")
            done = before
            with bar("answering", "rows") as advance:

                def step() -> None:
                    nonlocal done
                    done += 1
                    advance(done, len(rows))

                asyncio.run(
                    batch.run(
                        build(service),
                        path,
                        rows,
                        answered,
                        at_once=args.at_once,
                        receipts=not args.no_receipts,
                        step=step,
                    )
                )
        planes = model.engine.activation_planes
    failed = [i for i in known if answered.done[i] != 200]
    print(f"{count(len(rows), 'row')} answered in {args.output}, {len(failed)} of them refused")
    if args.audit:
        _audit(args, answered, planes)
    answered.close()


def _audit(args: argparse.Namespace, answered: Any, planes: int) -> None:
    """Compute a share of the rows again on another backend."""
    from isobit.server import batch  # noqa: PLC0415  # an extra

    receipts: list[tuple[str, Receipt]] = []
    for row in answered.rows():
        name = row["custom_id"]
        if batch.chosen(name, args.audit) and row["response"]["status_code"] == 200:
            choices = row["response"]["body"].get("choices", [])
            receipts += [
                (name, Receipt.of(c["isobit_receipt"], f"{answered.path}: {name}"))
                for c in choices
                if "isobit_receipt" in c
            ]
    if not receipts:
        say("audit: not run: no row with a receipt is in that share")
        return
    longest = max(len(r.prompt) + len(r.tokens) for _, r in receipts)
    wrong: list[str] = []
    with tools.open_exactly(args.model, args.audit_backend, planes, args.threads, longest) as model:
        with bar("computing again", "answers") as advance:
            for i, (name, receipt) in enumerate(receipts, 1):
                difference = replay(receipt, model)
                if difference is not None:
                    wrong.append(f"{name} at {difference}")
                advance(i, len(receipts))
        where = f"{model.backend.name} ({model.backend.device})"
    if wrong:
        more = f", and {len(wrong) - 1} more" if wrong[1:] else ""
        raise GateFailed(f"audit on {where}: {wrong[0]}{more} of {len(receipts)} differ")
    print(f"audit: {count(len(receipts), 'answer')} identical on {where}")
