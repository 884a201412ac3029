"""``isobit batch``: answer a file of requests, each with a receipt; check a share elsewhere."""

import argparse
import asyncio
from functools import partial
from pathlib import Path
from typing import Any

from isobit.backend_names import BACKENDS, VARIANTS
from isobit.cli import argtypes, event_loop, options, say, tools
from isobit.cli.output import bar, busy, count
from isobit.errors import GateFailed, UsageError
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
        type=argtypes.output_file,
        metavar="OUT",
        required=True,
        help="answers, one a line; rows that it has already are not asked for again",
    )
    group = parser.add_argument_group("batch")
    group.add_argument(
        "--at-once",
        type=argtypes.at_least(1),
        default=64,
        metavar="N",
        help="requests that are answered together (default: %(default)s)",
    )
    group.add_argument(
        "--no-receipts", action="store_true", help="leave out the receipt of every answer"
    )
    group.add_argument(
        "--audit",
        type=argtypes.share,
        default=0.0,
        metavar="SHARE",
        help="compute this share of the rows again on --audit-backend, and compare: 0.01",
    )
    group.add_argument(
        "--audit-backend",
        default="reference",
        help="(default: %(default)s, the specification: slow)",
    )
    group.add_argument(
        "--ray",
        action="store_true",
        help="by workers on a cluster of Ray, that of RAY_ADDRESS; the audit is then another "
        "kind of worker's than the one that answered, where there are several kinds",
    )
    group.add_argument(
        "--workers",
        type=_workers,
        default={},
        metavar="BACKEND=N,…",
        help="with --ray: so many of each backend, which may differ; each has --threads "
        "processors, cuda a GPU (default: one for each GPU, or machine)",
    )
    options.add_context(parser)
    options.add_engine(parser, sequences=4)
    options.add_inexact(parser)


def _workers(text: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for part in text.split(","):
        backend, _, n = part.partition("=")
        if backend not in (*BACKENDS, *VARIANTS) or not n.isdecimal() or not 0 < int(n) < 1e5:
            raise argparse.ArgumentTypeError(
                f"expected backends and numbers, such as cpu=4,cuda=2; got {text!r:.60}"
            )
        found[backend] = int(n)
    return found


def main(args: argparse.Namespace) -> None:
    """Run the command."""
    try:
        from isobit.server.app import build  # noqa: PLC0415
        from isobit.server.batch import batch  # noqa: PLC0415  # an extra
        from isobit.server.service import Service  # noqa: PLC0415
    except ImportError as error:
        raise UsageError(f"{error.name}: not installed: pip install '.[serve]'") from None
    if args.audit and args.no_receipts:
        raise UsageError("--audit: expected receipts to compute again, got --no-receipts")
    if args.workers and not args.ray:
        raise UsageError("--workers: expected --ray beside it, got none")
    path = Path(args.prompts)
    rows = batch.read_rows(path)
    if args.ray:
        event_loop.run(_on_ray(args, path, rows))
        return
    with options.open_model(args, args.context) as model:
        limits = batch.limits_of(model.engine, args.at_once)
        with Service(model, limits=limits) as service:
            ask = partial(batch.post, build(service))
            answered = event_loop.run(_answer(args, path, rows, ask, service.fingerprint))
        bits = model.engine.activation_bits
    if args.audit:
        _audit(args, answered, bits)
    answered.close()


async def _answer(
    args: argparse.Namespace, path: Path, rows: Any, ask: Any, fingerprint: str, workers: int = 1
) -> Any:
    """Answer what is not finished, so many rows at once for each of so many workers."""
    from isobit.server.batch import batch  # noqa: PLC0415  # an extra

    answered = batch.Answered(Path(args.output), fingerprint, rows)
    known = {row.custom_id for row in rows}
    done = len(known & answered.done.keys())
    if done:
        say(f"{count(done, 'row')} of {len(rows):,} finished before")
    with bar("answering", "rows") as advance:

        def step() -> None:
            nonlocal done
            done += 1
            advance(done, len(rows))

        try:
            await batch.run(
                ask,
                path,
                rows,
                answered,
                at_once=args.at_once * workers,
                receipts=not args.no_receipts,
                step=step,
            )
        except asyncio.CancelledError:
            far = f"after {done:,} of {count(len(rows), 'row')}"
            raise asyncio.CancelledError(f"{far}; start it again to go on") from None
    failed = [i for i in known if answered.done[i] != 200]
    print(f"{count(len(rows), 'row')} answered in {args.output}, {len(failed)} of them refused")
    return answered


async def _on_ray(args: argparse.Namespace, path: Path, rows: Any) -> None:
    """The same by workers on a cluster of Ray; a share is computed again by those of another kind
    than the one that answered."""
    from isobit.server.batch import batch  # noqa: PLC0415  # an extra
    from isobit.server.batch.on_ray import Workers  # noqa: PLC0415  # another

    engine = options.engine_of(args, args.context)
    async with Workers(args.model, engine, args.at_once, say) as workers:
        with busy(f"loading {args.model}"):
            await workers.hire(args.workers)
        answered = await _answer(args, path, rows, workers.ask, workers.fingerprint, len(workers))
        receipts = _receipts(args, answered) if args.audit else []
        answered.close()
        if not receipts:
            return
        wrong: list[str] = []
        done, left = 0, iter(receipts)
        with bar("computing again", "answers") as advance:
            await workers.hire_others({r.backend for _, r in receipts}, args.audit_backend)

            async def check() -> None:
                nonlocal done
                for name, receipt in left:
                    difference = await workers.replay(receipt)
                    if difference is not None:
                        wrong.append(f"{name} at {difference}")
                    done += 1
                    advance(done, len(receipts))

            await batch.together(check, len(workers))
        _judge(wrong, len(receipts), f"workers of {', '.join(sorted(workers.backends))}")


def _receipts(args: argparse.Namespace, answered: Any) -> list[tuple[str, Receipt]]:
    """Those of the rows that are computed again."""
    from isobit.server.batch import batch  # noqa: PLC0415  # an extra

    receipts: list[tuple[str, Receipt]] = []
    for row in answered.rows():
        name = row["custom_id"]
        if batch.chosen(name, args.audit) and row["response"]["status_code"] == 200:
            body = row["response"]["body"]
            receipts += [
                (name, Receipt.of(answer["isobit_receipt"], f"{answered.path}: {name}"))
                for answer in (body, *body.get("choices", ()))
                if "isobit_receipt" in answer
            ]
    if not receipts:
        say("audit: not run: no row with a receipt is in that share")
    return receipts


def _audit(args: argparse.Namespace, answered: Any, bits: int) -> None:
    """Compute a share of the rows again on another backend."""
    receipts = _receipts(args, answered)
    if not receipts:
        return
    longest = max(len(r.prompt) + len(r.tokens) for _, r in receipts)
    wrong: list[str] = []
    with tools.open_exactly(args.model, args.audit_backend, bits, args.threads, longest) as model:
        with bar("computing again", "answers") as advance:
            for i, (name, receipt) in enumerate(receipts, 1):
                difference = replay(receipt, model)
                if difference is not None:
                    wrong.append(f"{name} at {difference}")
                advance(i, len(receipts))
        where = f"{model.backend.name} ({model.backend.device})"
    _judge(wrong, len(receipts), where)


def _judge(wrong: list[str], n: int, where: str) -> None:
    if wrong:
        more = f", and {len(wrong) - 1} more" if wrong[1:] else ""
        raise GateFailed(f"audit on {where}: {wrong[0]}{more} of {n} differ")
    print(f"audit: {count(n, 'answer')} identical on {where}")
