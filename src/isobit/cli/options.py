"""Options that several commands share, and what is made of them."""

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from isobit.backends import NAMES
from isobit.cli import say
from isobit.config import EngineConfig
from isobit.errors import UsageError
from isobit.runtime.generation import Settings
from isobit.runtime.model import Model
from isobit.runtime.sampler import Sampling

PROMPT_LIMIT = 16 << 20  # bytes; the longest contexts hold a tenth of it


def add_model(parser: argparse.ArgumentParser) -> None:
    """MODEL, the sample if it is left out."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        default="sample",
        help='a GGUF file, hf://ORG/REPO[:QUANT], ollama://NAME, or "sample", which comes with '
        "isobit (default: %(default)s)",
    )


def add_engine(
    parser: argparse.ArgumentParser, *, planes: bool = True, backend: str = "auto"
) -> None:
    """How the model is run; ``planes=False`` where something else says how many."""
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--backend",
        default=backend,
        help=f"auto (the fastest that runs here), {', '.join(NAMES)} (default: %(default)s)",
    )
    if planes:
        group.add_argument(
            "--planes",
            "--activation-planes",
            dest="activation_planes",
            type=int,
            metavar="N",
            default=EngineConfig.activation_planes,
            help="int8 planes of an activation: 2 (16 bits) or 1 (int8) (default: %(default)s)",
        )
    group.add_argument(
        "-t", "--threads", type=int, metavar="N", help="CPU threads (default: every usable core)"
    )


def add_inexact(parser: argparse.ArgumentParser) -> None:
    """For commands whose outputs say what device they are from."""
    parser.add_argument(
        "--allow-inexact",
        action="store_true",
        help="run on a wgpu device that fails its self-test; what comes out is marked INEXACT",
    )


def add_context(parser: argparse.ArgumentParser) -> None:
    """The longest sequence."""
    parser.add_argument(
        "-c", "--context", type=int, metavar="N", help="longest sequence (default: the model's)"
    )


def open_model(args: argparse.Namespace, context: int | None, sequences: int = 1) -> Model:
    """The model that the arguments ask for, with room for sequences of ``context`` tokens."""
    engine = EngineConfig(
        activation_planes=args.activation_planes,
        threads=args.threads,
        context=context,
        max_sequences=sequences,
        allow_inexact=args.allow_inexact,
    )
    return Model(args.model, args.backend, engine, say)


def add_prompt(
    parser: argparse.ArgumentParser, *flags: str, required: bool, text: str = "the prompt"
) -> None:
    """The prompt, in one of three ways; ``flags`` are those of the first."""
    group = parser.add_argument_group("prompt").add_mutually_exclusive_group(required=required)
    group.add_argument(*flags, dest="prompt", metavar="TEXT", help=text)
    group.add_argument(
        "--prompt-file", metavar="FILE", help=f"{text}: a UTF-8 file, - for standard input"
    )
    group.add_argument(
        "--tokens", type=_token_ids, metavar="IDS", help="token ids instead: 785,921,308"
    )


def read_prompt(args: argparse.Namespace) -> str | list[int] | None:
    """The prompt as text or token ids; None if none was given."""
    if args.prompt_file is not None:
        return read_text(args.prompt_file)
    prompt: str | list[int] | None = args.tokens if args.prompt is None else args.prompt
    return prompt


def read_text(path: str) -> str:
    """A UTF-8 file, or standard input for ``-``."""
    name = "standard input" if path == "-" else path
    try:
        if path == "-":
            data = sys.stdin.buffer.read(PROMPT_LIMIT + 1)
        else:
            with Path(path).open("rb") as file:
                data = file.read(PROMPT_LIMIT + 1)
        if len(data) <= PROMPT_LIMIT:
            return data.decode()
    except UnicodeDecodeError as error:
        found = f"{error.reason} at byte {error.start}"
        raise UsageError(f"{name}: expected UTF-8 text, got {found}") from None
    except OSError as error:
        raise UsageError(f"{name}: expected a readable file, got: {error.strerror}") from None
    except ValueError as error:  # a NUL in the path
        raise UsageError(f"{name}: expected a file name, got: {error}") from None
    raise UsageError(f"{name}: expected a prompt of at most {PROMPT_LIMIT} bytes, got more")


def output_file(path: str) -> str:
    """A file that a run writes at its end, refused before it begins if that will fail."""
    file = Path(path)
    if file.is_dir() or not file.parent.is_dir():
        found = "a folder" if file.is_dir() else f"no folder {str(file.parent)!r}"
        raise argparse.ArgumentTypeError(f"cannot write {path!r}: expected a file, got {found}")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write {path!r}: no permission")
    return path


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How tokens are chosen."""
    group = parser.add_argument_group("sampling")

    def number(flag: str, kind: type, text: str) -> None:
        default = getattr(Sampling, flag.lstrip("-").replace("-", "_"))
        group.add_argument(
            flag, type=kind, default=default, metavar="X", help=f"{text} (default: %(default)s)"
        )

    number("--temperature", float, "0 takes the likeliest token")
    number("--top-k", int, "keep the K likeliest tokens; 0 keeps all")
    number("--top-p", float, "keep the fewest tokens whose probabilities reach this sum")
    number("--min-p", float, "keep tokens at least this fraction as likely as the likeliest")
    number("--repeat-penalty", float, "make tokens that occurred less likely; 1 does not")
    group.add_argument("--seed", type=int, metavar="X", help="repeats a sampled text")
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this; repeatable"
    )


def settings(args: argparse.Namespace) -> Settings:
    """The arguments of ``add_sampling``, and ``--max-tokens``, as ``Model.stream`` takes them.

    Ask before a model is opened: what is out of range is refused here, and loading takes time.
    """
    Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repeat_penalty, args.seed)
    return Settings(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repeat_penalty=args.repeat_penalty,
        seed=args.seed,
        stop=args.stop,
    )


def at_least(least: int) -> Callable[[str], int]:
    """An argument's type: a whole number that is not below ``least``."""

    def parse(text: str) -> int:
        with suppress(ValueError):
            if (n := int(text)) >= least:
                return n
        shown = text if len(text) <= 40 else text[:40] + "…"
        raise argparse.ArgumentTypeError(f"expected a whole number, {least} or more; got {shown!r}")

    return parse


def _token_ids(text: str) -> list[int]:
    return comma_list(text, "token ids: expected numbers with commas, such as 785,921,308")


def comma_list(text: str, complaint: str) -> list[int]:
    """Integers with commas between them."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        shown = text if len(text) <= 40 else text[:40] + "…"
        raise argparse.ArgumentTypeError(f"{complaint}; got {shown!r}") from None
