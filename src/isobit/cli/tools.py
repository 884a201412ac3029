"""What the commands that compare runs share: tokens, backends that must not fall back, reports."""

import argparse
import json
from pathlib import Path

from isobit.backends import FallbackNote
from isobit.cli import options, say
from isobit.cli.output import add_format, busy, print_table
from isobit.config import EngineConfig
from isobit.errors import GateFailed, NothingCompared, UsageError
from isobit.gguf.reader import GGUFFile
from isobit.runtime.model import Model, sample_path
from isobit.text.tokenizer import Tokenizer
from isobit.verify import report
from isobit.verify.diff import Diff
from isobit.verify.oracle import Oracle
from isobit.verify.trace import Recordable

_DROP = ("max ulp", "cosine", "NaN/Inf", "rel. RMS", "layers", "max |A-B|")
"""Columns of a comparison that a narrow terminal does without, the first of them first."""


def prompt_tokens(args: argparse.Namespace) -> list[int]:
    """The prompt's token ids; read before the model, whose context they set."""
    prompt = options.read_prompt(args)
    assert prompt is not None
    return prompt if isinstance(prompt, list) else text_tokens(args.model, prompt)


def text_tokens(model: str, text: str, *, special: bool = True) -> list[int]:
    """Token ids of a text in a model's vocabulary; ``special`` tokens in it are recognised."""
    with open_file(model) as file:
        return Tokenizer.from_metadata(file.metadata, str(file.path)).encode(text, special=special)


def open_file(model: str) -> GGUFFile:
    """A model's file, without a backend."""
    return GGUFFile.open(sample_path() if model == "sample" else model)


def foreign_run(name: str, file: GGUFFile) -> Recordable | None:
    """What computes a model besides the backends: "oracle" or "hf"; None for any other name."""
    if name == "oracle":
        return Oracle.of(file)
    if name == "hf":
        from isobit.verify.hf import Transformers  # noqa: PLC0415 - needs PyTorch

        return Transformers.of(file)
    return None


def open_exactly(model: str, backend: str, planes: int, threads: int | None, context: int) -> Model:
    """A model on the backend that was named; raises NothingCompared where it falls back."""

    def refuse(note: str) -> None:
        if isinstance(note, FallbackNote):
            raise NothingCompared(f"{note}; name the backend that is meant")
        say(note)

    engine = EngineConfig(
        activation_planes=planes, threads=threads, context=max(context, 1), max_sequences=1
    )
    with busy(f"loading {model}"):
        opened = Model(model, backend, engine, refuse)
    if backend not in ("auto", opened.backend.name):
        opened.close()
        raise NothingCompared(f"backend: expected {backend}, got {opened.backend.name}")
    return opened


def add_output(parser: argparse.ArgumentParser) -> None:
    """The trace to write."""
    parser.add_argument(
        "-o",
        "--output",
        type=options.output_file,
        required=True,
        metavar="FILE",
        help="file to write",
    )


def add_report(parser: argparse.ArgumentParser) -> None:
    """How a comparison is shown."""
    group = parser.add_argument_group("report")
    group.add_argument(
        "--layers", default="all", metavar="A..B", help="layers, both included (default: all)"
    )
    group.add_argument("--every", action="store_true", help="a row for each layer of each stage")
    group.add_argument("--json", action="store_true", help="print one JSON object instead")
    add_format(group)
    group.add_argument(
        "--html",
        type=options.output_file,
        metavar="FILE",
        help="also write a page that needs no network",
    )


def show(diff: Diff, args: argparse.Namespace) -> None:
    """Print a comparison and write its page; raises GateFailed if the runs differ."""
    if args.html:
        try:
            Path(args.html).write_text(report.html(diff), "utf-8")
        except (OSError, ValueError) as error:
            raise UsageError(f"{args.html}: cannot write the report: {error}") from None
        say(f"wrote {args.html}")
    if args.json:
        print(json.dumps(diff.to_json(), allow_nan=False))
    else:
        print("\n".join(report.summary(diff)), end="\n\n")
        header, rows = report.table(diff, every=args.every)
        print_table(header, rows, args.format, drop=_DROP)
    if not diff.accuracy and diff.first is not None:
        faulty = diff.faulty
        cause = f"; faulty: {faulty[0].where}" if faulty else ""
        raise GateFailed(f"the runs differ, first at {diff.first.where}{cause}")
