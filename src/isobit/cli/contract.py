"""``isobit contract``: write, judge, check and amend contracts."""

import argparse
import json
import os
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from isobit import __version__
from isobit.backend_names import BACKENDS
from isobit.cli import EXIT_CODES, argtypes, options_of, say
from isobit.cli.output import add_format, print_document
from isobit.errors import FileRefused, GateFailed, NotRun, UsageError

# What a command needs is imported by it: validate is to be quick.
if TYPE_CHECKING:
    from isobit.contracts.document import Document
    from isobit.contracts.evidence import Evidence, Result
    from isobit.contracts.findings import Finding
    from isobit.contracts.schema import Contract
    from isobit.contracts.status import Status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def add(name: str, text: str, files: str | None) -> argparse.ArgumentParser:
        action = actions.add_parser(
            name, help=text, description=text, epilog=EXIT_CODES, allow_abbrev=False
        )
        if files is not None:
            action.add_argument("file", metavar="FILE", nargs=files or None, help="a contract")
        return action

    add("schema", "print the JSON Schema of contracts, for editors", None)
    for name, text in (
        ("validate", "check syntax, types, keys and ids"),
        ("lint", "check what a schema cannot: versions, history, coverage, citations, thresholds"),
    ):
        add(name, text, "+").add_argument(
            "--format",
            choices=("text", "json", "sarif", "github"),
            default="text",
            help="how findings are printed (default: %(default)s)",
        )
    _add_check(add("check", "take a contract's measures and write what was found", ""))
    action = add("status", "obligations × backends, by the evidence there is", "+")
    action.add_argument("--evidence", metavar="DIR", help=_EVIDENCE)
    action.add_argument(
        "-o",
        "--output",
        type=argtypes.output_file,
        metavar="FILE",
        help="write the table (Markdown) here",
    )
    action.add_argument(
        "--html",
        type=argtypes.output_file,
        metavar="FILE",
        help="also write a page that needs no network",
    )
    action.add_argument("--json", action="store_true", help="print one JSON object a contract")
    add_format(action)
    action.add_argument(
        "--gate",
        action="store_true",
        help="exit 1 if a row is failing or stale or a status is not shown, 6 if a row was not run",
    )
    _add_amend(add("amend", "add an entry to the history and raise the version everywhere", ""))


_EVIDENCE = "folder of the evidence (default: evidence/NAME beside the contract)"


def _add_check(action: argparse.ArgumentParser) -> None:
    action.add_argument(
        "--model", metavar="M", default="sample", help="a GGUF file (default: %(default)s)"
    )
    action.add_argument(
        "--backends", metavar="B,…", help="backends to check (default: all that it speaks of)"
    )
    some = action.add_mutually_exclusive_group()
    some.add_argument("--tests", metavar="ID,…", help="only these; writes no evidence by itself")
    some.add_argument("--without", metavar="ID,…", help="all but these; likewise")
    action.add_argument("--evidence", metavar="DIR", help=_EVIDENCE)
    action.add_argument("--peer", metavar="PATH", help="llama-bench, for ratios")
    action.add_argument(
        "--seed", type=argtypes.at_least(0), metavar="N", help="repeats a run's random choices"
    )
    action.add_argument("--commit", metavar="C", help="if there is no repository to ask")
    action.add_argument("-t", "--threads", type=argtypes.whole, metavar="N", help="CPU threads")


def _add_amend(action: argparse.ArgumentParser) -> None:
    action.add_argument(
        "--title", metavar="TEXT", help="what changed, in a line (default: what was measured)"
    )
    action.add_argument(
        "--description", metavar="TEXT", help="what follows; put before what the evidence says"
    )
    action.add_argument("--kind", default="amendment", metavar="WORD", help="%(default)s, …")
    action.add_argument("--evidence", metavar="DIR", help=_EVIDENCE)
    action.add_argument(
        "--divergence",
        metavar="CLASS",
        choices=(
            "KNOWN_DIVERGENCE_BENIGN",
            "KNOWN_LIMITATION_BENIGN",
            "KNOWN_DIVERGENCE_NOT_BENIGN",
        ),
        help="the class that the failing obligations are expected to get; evidence decides",
    )
    group = action.add_mutually_exclusive_group()
    group.add_argument(
        "--bump", choices=("major", "minor", "patch"), default="minor", help="(default: minor)"
    )
    group.add_argument("--version", dest="to", metavar="X.Y.Z", help="the new version")
    action.add_argument("--date", metavar="YYYY-MM-DD", help="(default: today, UTC)")
    action.add_argument(
        "--status",
        metavar="STATUS",
        help="the contract's new status; refused if evidence denies it",
    )
    action.add_argument("--dry-run", action="store_true", help="print the contract, write nothing")


def main(args: argparse.Namespace) -> None:
    """Run the command."""
    {
        "schema": _schema,
        "validate": _judge,
        "lint": _judge,
        "check": _check,
        "status": _status,
        "amend": _amend,
    }[args.action](args)


def _schema(_: argparse.Namespace) -> None:
    from isobit.contracts.schema import json_schema  # noqa: PLC0415

    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))


def _judge(args: argparse.Namespace) -> None:
    """Validate, and for lint more; raises GateFailed on any error.

    Other files may lie among contracts (``contracts/**/*.yaml``); they are named. Where there is
    nothing else, nothing was judged, which is an error.
    """
    from isobit.contracts import document, findings, validate  # noqa: PLC0415

    found: list[Finding] = []
    others = 0
    for path in args.file:
        read = document.read(path)
        contract = validate.validate(read)
        if contract is not None and args.action == "lint":
            from isobit.contracts import claims, lint  # noqa: PLC0415

            lint.lint(read, contract, options_of)
            claims.check_evidence(read, contract)
        found += read.findings
        others += any(f.rule == "not-a-contract" for f in read.findings)
    if others == len(args.file):
        found = [replace(f, severity="error") for f in found]
    errors, _ = findings.counts(found)
    verdict = "Contract is valid" if not errors else "Contract is not valid"
    if len(args.file) > 1:
        verdict = verdict.replace("Contract is", "Contracts are")
    if others and not errors:
        verdict += f" ({len(args.file) - others}; files that are none: {others})"
    if args.format == "text":
        print(findings.text(found))
        print(verdict)
    elif args.format == "json":
        print(findings.to_json(found))
    elif args.format == "sarif":
        print(findings.sarif(found, __version__))
    elif found:
        print(findings.github(found))
    if errors:
        raise GateFailed(f"{errors} error(s); {verdict.lower()}")


def _opened(path: str) -> "tuple[Document, Contract]":
    """A contract that is valid; raises FileRefused with the first error."""
    from isobit.contracts import document, validate  # noqa: PLC0415

    read = document.read(path)
    contract = validate.validate(read)
    errors = [f for f in read.findings if f.severity == "error"]
    if errors or contract is None:
        first = (errors or read.findings)[0]
        raise FileRefused(
            f"{first.file}:{first.line}:{first.column}: {first.message}; see contract validate"
        )
    return read, contract


def _check(args: argparse.Namespace) -> None:
    from isobit.contracts.check import check, select  # noqa: PLC0415
    from isobit.contracts.evidence import default_folder  # noqa: PLC0415

    _, contract = _opened(args.file)
    path = Path(args.file)
    some = [ids.split(",") if ids else [] for ids in (args.tests, args.without)]
    tests = select(contract, *some)
    named = {b for t in tests if t.measure for b in t.measure.backends}
    backends = [b for b in BACKENDS if b in named]
    if args.backends is not None:
        backends = args.backends.split(",")
        for b in backends:
            if b not in named:
                known = ", ".join(sorted(named))
                raise UsageError(f"--backends: expected those of the tests, {known}; got {b!r}")
    folder = Path(args.evidence) if args.evidence else default_folder(path)
    written = bool(args.evidence) or not any(some)
    if written:
        _require_writable(folder)
    found = []
    for b in backends:
        print(f"{b}:", flush=True)
        try:
            evidence = check(
                contract,
                path,
                args.model,
                b,
                tests=tests,
                threads=args.threads,
                peer=args.peer,
                commit=args.commit,
                seed=args.seed,
                progress=lambda result: print(_line(result), flush=True),
            )
        except KeyboardInterrupt:  # part of it in its place would take away what was there
            raise KeyboardInterrupt(f"while {b} was measured, of which none is kept") from None
        found.append(evidence)
        if all(r.outcome == "not run" for r in evidence.results):
            say(f"{b}: nothing was measured, so no evidence is written")
        elif written:
            say(f"wrote {evidence.save(folder)}")
    _verdict(found)


def _require_writable(folder: Path) -> None:
    """Refuse before the run what could not be written after it."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        found = "no permission" if there.is_dir() else f"{str(there)!r} is a file"
        raise UsageError(f"{folder}: cannot write the evidence: expected a folder, got: {found}")


def _line(result: "Result") -> str:
    shown = result.reason or ", ".join(
        f"{name} {result.figures[name]:.6g}" for name in result.measure["threshold"]
    )
    return f"  {result.outcome:8} {result.test} ({result.kind}, {result.seconds:.1f} s): {shown}"


def _verdict(found: "list[Evidence]") -> None:
    """Print the counts; raises GateFailed for a failure, NotRun for what was not run."""
    outcomes = [r.outcome for e in found for r in e.results]
    failing, missing = outcomes.count("failing"), outcomes.count("not run")
    passed = outcomes.count("passed")
    print(f"{passed} passed, {failing} failing, {missing} not run")
    if failing:
        raise GateFailed(f"{failing} of {len(outcomes)} measures failing")
    if missing or not passed:
        raise NotRun(f"{missing} of {len(outcomes)} measures were not run")


def _standing(args: argparse.Namespace, name: str, contract: "Contract") -> "Status":
    """A contract beside its evidence."""
    from isobit.contracts import evidence, status  # noqa: PLC0415

    path = Path(name)
    folder = Path(args.evidence) if args.evidence else evidence.default_folder(path)
    if args.evidence and not folder.is_dir():
        raise UsageError(f"--evidence: expected a folder, got {args.evidence!r}, which is none")
    return status.status(contract, path.stem, evidence.load_all(folder), path.parent)


def _status(args: argparse.Namespace) -> None:
    from isobit.contracts import status_report  # noqa: PLC0415

    found = [_standing(args, name, _opened(name)[1]) for name in args.file]
    table = "\n".join(status_report.markdown(s) for s in found)
    for target, text in ((args.output, table), (args.html, status_report.html(found))):
        if target is not None:
            try:
                Path(target).write_text(text, "utf-8")
            except (OSError, ValueError) as error:
                raise UsageError(f"{target}: cannot write the status: {error}") from None
            say(f"wrote {target}")
    if args.json:
        print(json.dumps([status_report.to_json(s) for s in found], indent=2))
    elif args.output is None:
        print_document(table, args.format)
    if args.gate:
        _gate(found)


def _gate(found: "list[Status]") -> None:
    """Raises GateFailed for a row that is failing or stale and for a status that evidence does not
    show, NotRun for a row of which nothing is known, and for a contract without any."""
    from isobit.contracts import claims  # noqa: PLC0415

    failing, stale, missing = (
        sum(s.count(state) for s in found) for state in ("failing", "stale", "not run")
    )
    if failing or stale:
        raise GateFailed(f"{failing} failing and {stale} stale rows")
    if missing:
        raise NotRun(f"{missing} rows were not run")
    for s in found:
        if not s.count("discharged"):
            raise NotRun(f"{s.name}: expected an obligation that is discharged, found none")
        if unseen := claims.missing(s, s.declared):
            shown = claims.listed(unseen)
            raise GateFailed(f"status {s.declared}: the evidence does not show it: {shown}")


def _amend(args: argparse.Namespace) -> None:
    from isobit.contracts import amend, claims, document, validate  # noqa: PLC0415

    read, contract = _opened(args.file)
    found = _standing(args, args.file, contract)
    classes = claims.divergences(found, args.divergence)
    if args.status is not None:
        claims.require(found, args.status, classes)
    elif denied := claims.denials(found, found.declared, classes):
        raise GateFailed(
            f"status {found.declared}: the evidence denies it: {claims.listed(denied)}; amend it "
            "with a --status that the evidence allows"
        )
    title, description = claims.draft(found, args.status, classes)
    entry = {
        "version": args.to or amend.bumped(contract.metadata.version, args.bump),
        "date": args.date or datetime.now(UTC).date().isoformat(),
        "kind": args.kind,
        "title": args.title or title,
    }
    known = [c for c in classes.values() if c is not None]
    if known:
        entry["divergence"] = known[0]
    if text := "\n\n".join(filter(None, (args.description, description))):
        entry["description"] = text
    places = {row.id: i for i, row in enumerate(found.rows[: len(contract.proof_obligations)])}
    divergences = {places[name]: c for name, c in classes.items() if name in places}
    text = amend.amended(read, entry, args.status, divergences)
    again = document.parse(text, args.file)
    validate.validate(again)
    errors = [f for f in again.findings if f.severity == "error"]
    if errors:
        raise UsageError(
            f"{args.file}: the amended contract would not be valid: {errors[0].message}"
        )
    if args.dry_run:
        print(text, end="")
        return
    amend.write(args.file, text)
    print(f"{args.file}: {contract.metadata.version} to {entry['version']}: {entry['title']}")
