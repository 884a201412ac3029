"""``isobit contract``: write, judge, check and amend contracts."""

import argparse
import json

from isobit import __version__
from isobit.cli import options_of
from isobit.errors import GateFailed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return actions.add_parser(name, help=text, description=text, allow_abbrev=False)

    add("schema", "print the JSON Schema of contracts, for editors")
    for name, text in (
        ("validate", "check syntax, types, keys and ids"),
        ("lint", "check what a schema cannot: versions, history, coverage, citations, thresholds"),
    ):
        action = add(name, text)
        action.add_argument("files", metavar="FILE", nargs="+", help="a contract, YAML")
        action.add_argument(
            "--format",
            choices=("text", "json", "sarif", "github"),
            default="text",
            help="how findings are printed (default: %(default)s)",
        )


def main(args: argparse.Namespace) -> None:
    """Run the command."""
    {"schema": _schema, "validate": _judge, "lint": _judge}[args.action](args)


def _schema(_: argparse.Namespace) -> None:
    from isobit.contracts.schema import json_schema  # noqa: PLC0415

    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))


def _judge(args: argparse.Namespace) -> None:
    """Validate, and for lint more; raises GateFailed on any error."""
    from isobit.contracts import document, findings, validate  # noqa: PLC0415

    found = []
    for path in args.files:
        read = document.read(path)
        contract = validate.validate(read)
        if contract is not None and args.action == "lint":
            from isobit.contracts.lint import lint  # noqa: PLC0415

            lint(read, contract, options_of)
        found += read.findings
    errors, _ = findings.counts(found)
    verdict = "Contract is valid" if not errors else "Contract is not valid"
    if len(args.files) > 1:
        verdict = verdict.replace("Contract is", "Contracts are")
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
