"""What the commands that compare runs share: tokens, backends that must not fall back, reports."""

import argparse
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Unpack

from isobit.backends import FallbackNote
from isobit.backends.cpu._cpu import exit_on_bus_error
from isobit.cli import argtypes, options, prompt_options, say
from isobit.cli.output import add_format, busy, print_table
from isobit.config import EngineConfig
from isobit.errors import GateFailed, NothingCompared, UsageError, printable
from isobit.gguf.reader import GGUFFile
from isobit.model.checkpoint import open_model
from isobit.runtime.model import Model, locate
from isobit.text.tokenizer import Tokenizer
from isobit.verify import blame, report
from isobit.verify.diff import Diff
from isobit.verify.oracle import Oracle
from isobit.verify.trace import Recordable

_DROP = ("max ulp", "cosine", "NaN/Inf", "rel. RMS", "layers", "max |A-B|", "own rel. RMS")
"""Columns of a comparison that a narrow terminal does without, the first of them first."""


def add_prompts(parser: argparse.ArgumentParser) -> None:
    """A prompt in one of three ways, or several in a file."""
    prompt_options.add_prompt(parser, "-p", "--prompt", required=False)
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help='several prompts, one a line: text, text in quotes ("a\\n", as in JSON), or token ids '
        "in brackets ([785, 9217, 308])",
    )


def read_prompts(args: argparse.Namespace) -> list[list[int]]:
    """The token ids of every prompt; read before the model, whose context they set."""
    alone = prompt_options.read_prompt(args)
    if (alone is None) == (args.prompts is None):
        given = "none" if alone is None else "several"
        raise UsageError(f"expected one of -p, --prompt-file, --tokens, --prompts; got {given}")
    if alone is not None:
        return [alone if isinstance(alone, list) else text_tokens(args.model, alone)]
    found = []
    for number, line in enumerate(prompt_options.read_text(args.prompts).splitlines(), 1):
        if line.strip():
            try:
                prompt = _prompt(line)
            except UsageError as error:
                raise UsageError(f"{args.prompts}:{number}: {error}") from None
            found.append(prompt if isinstance(prompt, list) else text_tokens(args.model, prompt))
    if not found:
        raise UsageError(f"{args.prompts}: expected a prompt a line, found none")
    return found


def _prompt(line: str) -> str | list[int]:
    """A line of a file of prompts."""
    if line.lstrip()[0] not in '["':
        return line
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(type(n) is int for n in value):
        return value
    raise UsageError(
        'expected text, text in quotes ("a\\n") or token ids in brackets ([785, 9217]), got '
        f"{line.strip()[:40]!r}"
    )


def prompt_tokens(args: argparse.Namespace) -> list[int]:
    """The prompt's token ids; read before the model, whose context they set."""
    prompt = prompt_options.read_prompt(args)
    assert prompt is not None
    return prompt if isinstance(prompt, list) else text_tokens(args.model, prompt)


def text_tokens(model: str, text: str, *, special: bool = True) -> list[int]:
    """Token ids of a text in a model's vocabulary; ``special`` tokens in it are recognised."""
    with open_file(model) as file:
        return Tokenizer.from_metadata(file.metadata, str(file.path)).encode(text, special=special)


def token_texts(model: str) -> blame.Text:
    """The texts of a model's tokens; of a file without a tokenizer, none."""
    with open_file(model) as file:
        metadata, name = file.metadata, str(file.path)

    def decode(ids: Sequence[int]) -> str:
        return Tokenizer.from_metadata(metadata, name).decode(ids)

    return blame.texts(decode)


def open_file(model: str) -> GGUFFile:
    """A model's file, without a backend."""
    return open_model(locate(model, say))


def foreign_run(name: str, file: GGUFFile) -> Recordable | None:
    """What computes a model besides the backends: "oracle" or "hf"; None for any other name."""
    if name == "oracle":
        return Oracle.of(file)
    if name == "hf":
        from isobit.verify.hf import Transformers  # noqa: PLC0415 - needs PyTorch

        return Transformers.of(file)
    return None


def open_exactly(
    model: str,
    backend: str,
    bits: int,
    threads: int | None,
    context: int,
    **sizes: Unpack[options.Sizes],
) -> Model:
    """A model on the backend that was named; raises NothingCompared where it falls back."""

    def refuse(note: str) -> None:
        if isinstance(note, FallbackNote):
            raise NothingCompared(f"{note}; name the backend that is meant")
        say(note)

    engine = EngineConfig(activation_bits=bits, threads=threads, context=max(context, 1), **sizes)
    exit_on_bus_error()
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
        type=argtypes.whole_file,
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
        type=argtypes.output_file,
        metavar="FILE",
        help="also write a page that needs no network",
    )


def add_cosine(parser: argparse.ArgumentParser) -> None:
    """A gate on the cosine of every layer's output."""
    parser.add_argument(
        "--min-cosine",
        type=_cosine,
        metavar="X",
        help="gate: the cosine that each layer's output must have, such as 0.99, in place of equal "
        "bits",
    )


def _cosine(text: str) -> float:
    with suppress(ValueError):
        if -1 < (value := float(text)) <= 1:
            return value
    raise argparse.ArgumentTypeError(f"expected a cosine above -1 and up to 1, got {text[:40]!r}")


def show(
    diff: Diff,
    args: argparse.Namespace,
    text: blame.Text | None = None,
    names: tuple[str, str] | None = None,
) -> None:
    """Print a comparison and write its page; raises GateFailed if the runs differ, or, with
    --min-cosine, if a layer is below it. ``text`` gives a token's text, ``names`` those of A and
    B."""
    gate = None if args.min_cosine is None else blame.gate([diff], args.min_cosine)
    if args.html:
        try:
            Path(args.html).write_text(report.html(diff, text, names), "utf-8")
        except (OSError, ValueError) as error:
            raise UsageError(f"{args.html}: cannot write the report: {error}") from None
        say(f"wrote {args.html}")
    if args.json:
        more = {} if gate is None else {"gate": gate_json(gate)}
        print(json.dumps(diff.to_json() | more, allow_nan=False))
    else:
        lines = report.summary(diff, text)
        lines += [] if gate is None else [f"gate: {gate}"]
        print("\n".join(map(printable, lines)), end="\n\n")
        header, rows = report.table(diff, every=args.every)
        print_table(header, rows, args.format, drop=_DROP)
    if gate is not None:
        require_gate(gate)
    if gate is not None or diff.accuracy:
        require_finite([diff])
    elif diff.first is not None:
        faulty = diff.faulty
        cause = f"; faulty: {faulty[0].where}" if faulty else ""
        raise GateFailed(f"the runs differ, first at {diff.first.where}{cause}")


def require_finite(diffs: Sequence[Diff]) -> None:
    """Raises GateFailed for values that are NaN or infinite in one run alone, of which figures over
    the others say nothing."""
    for diff in diffs:
        for s in diff.stages:
            n, m = s.distance.nonfinite_a, s.distance.nonfinite_b
            if (n == 0) != (m == 0):
                raise GateFailed(
                    f"{s.where}: {n or m} values are NaN or infinite in {'A' if n else 'B'} alone"
                )


def gate_json(gate: blame.Gate) -> dict[str, object]:
    """A gate's result, in JSON's types."""
    return {"least": gate.least, "cosines": gate.cosines, "below": gate.below}


def require_gate(gate: blame.Gate) -> None:
    """Raises GateFailed for a layer below the gate."""
    if gate.below:
        raise GateFailed(f"gate: {gate}")
