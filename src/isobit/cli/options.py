"""Options that several commands share, and what is made of them."""

import argparse
import errno
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypedDict

from isobit.backends import NAMES, VARIANTS, FallbackNote
from isobit.backends.cpu._cpu import exit_on_bus_error
from isobit.backends.hardware import gpus
from isobit.cli import say
from isobit.cli.output import busy
from isobit.config import MOST_PAGES, MOST_POSITIONS, EngineConfig, bits_of_planes
from isobit.errors import UsageError, no_such_file
from isobit.files import is_named_pipe
from isobit.numerics import TILE
from isobit.runtime.generation import Settings, checked_sampling
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
    parser: argparse.ArgumentParser,
    *,
    bits: bool = True,
    backend: str = "auto",
    sequences: int | None = 1,
) -> None:
    """How the model is run; ``bits=False`` and ``sequences=None`` where something else says how
    many."""
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--backend",
        default=backend,
        help=f"auto (the fastest that runs here), {', '.join(NAMES)}, or {', '.join(VARIANTS)}, "
        "operation by operation, every stage of which can be traced (default: %(default)s)",
    )
    if bits:
        add_activation_bits(group)
    group.add_argument(
        "-t",
        "--threads",
        type=whole,
        metavar="N",
        help="CPU threads (default: every usable core; fewer may be faster where cores are shared)",
    )
    group.add_argument(
        "--chunk",
        type=whole,
        metavar="N",
        default=EngineConfig.chunk,
        help="prompt tokens in a pass (default: %(default)s)",
    )
    group.add_argument(
        "--cache",
        type=at_least(1, MOST_PAGES * TILE),
        metavar="N",
        help="tokens of all sequences together that the KV cache has room for (default: enough for "
        "sequences of full length, as far as the memory goes)",
    )
    if sequences is not None:
        group.add_argument(
            "--sequences",
            type=at_least(1, MOST_POSITIONS),
            metavar="N",
            default=sequences,
            help="sequences that are run together (default: %(default)s)",
        )
    group.add_argument(
        "--parts",
        type=whole,
        metavar="N",
        default=EngineConfig.parts,
        help="processes that cpu, GPUs that cuda is split over (default: %(default)s)",
    )
    group.add_argument(
        "--expert-shares",
        type=_shares,
        metavar="N,…",
        default=(),
        help="each part has whole experts, in these proportions, instead of some columns of each",
    )
    group.add_argument(
        "--hosts",
        type=lambda text: tuple(text.split(",")),
        metavar="HOST:PORT,…",
        default=(),
        help="run the layers in the stages there, in order, instead of here (isobit stage); "
        "ray:FIRST:END@BACKEND is one on a cluster of Ray",
    )
    add_stage_key(group)


def add_activation_bits(group: argparse._ActionsContainer) -> None:
    """How finely activations are kept."""
    group.add_argument(
        "--activation-bits",
        type=whole,
        metavar="N",
        default=EngineConfig.activation_bits,
        help="bits of an activation: 16, or 8, which is faster and coarser (default: %(default)s)",
    )
    add_planes(group, "--planes", "--activation-planes")


def add_planes(
    group: argparse._ActionsContainer,
    *flags: str,
    to: str = "activation_bits",
    several: bool = False,
) -> None:
    """The former spelling: 2 or 1 planes of 8 bits. Accepted for a release."""

    def bits(text: str) -> int | list[int]:
        try:
            if several:
                return [bits_of_planes(n) for n in comma_list(text, "planes: expected 1, 2 or 1,2")]
            return bits_of_planes(whole(text))
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    hidden = argparse.SUPPRESS
    group.add_argument(*flags, dest=to, type=bits, metavar="N", default=hidden, help=hidden)


def _shares(text: str) -> tuple[int, ...]:
    shares = text.split(",")
    if not all(s.isdecimal() and len(s) < 7 and int(s) for s in shares):
        raise argparse.ArgumentTypeError(f"expected numbers >= 1, such as 3,1; got {text!r:.40}")
    return tuple(map(int, shares))


def add_stage_key(group: argparse._ActionsContainer) -> None:
    """What the stages of a pipeline and their caller know one another by."""
    group.add_argument(
        "--stage-key-env",
        metavar="VARIABLE",
        default="ISOBIT_STAGE_KEY",
        help="the environment variable that holds the key of the stages (default: %(default)s)",
    )


def stage_key(variable: str) -> bytes:
    """The key in an environment variable. Raises UsageError if there is none."""
    key = os.environ.get(variable, "").encode()
    if not key:
        raise UsageError(f"{variable}: expected the key of the stages in it, got nothing")
    return key


def add_front_key(group: argparse._ActionsContainer) -> None:
    """What servers and the front before them know one another by."""
    group.add_argument(
        "--front-key-env",
        metavar="VARIABLE",
        default="ISOBIT_FRONT_KEY",
        help="the environment variable that holds what a front proves itself by; the same for "
        "all servers behind one (default: %(default)s)",
    )


def add_server(group: argparse._ActionsContainer) -> None:
    """What is served to clients, and how it ends."""
    group.add_argument("--host", default="127.0.0.1", help="(default: %(default)s)")
    group.add_argument(
        "--port", type=at_least(0, 65535), default=8000, metavar="N", help="(default: %(default)s)"
    )
    group.add_argument(
        "--api-key-env",
        metavar="VARIABLE",
        help="the environment variable that holds the key that clients must give",
    )
    group.add_argument(
        "--origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let in scripts of pages from there, https://chat.example or '*'; may be repeated",
    )
    group.add_argument(
        "--grace",
        type=at_least(0),
        default=10,
        metavar="SECONDS",
        help="what runs may go on for so long after SIGTERM (default: %(default)s)",
    )


def secret(variable: str) -> str:
    """The key in an environment variable. Raises UsageError if there is none."""
    key = os.environ.get(variable)
    if not key:
        raise UsageError(f"{variable}: expected a key in it, got nothing")
    return key


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
        "-c", "--context", type=whole, metavar="N", help="longest sequence (default: the model's)"
    )


def open_model(
    args: argparse.Namespace, context: int | None, sequences: int | None = None
) -> Model:
    """The model that the arguments ask for, with room for sequences of ``context`` tokens."""
    engine = engine_of(args, context, sequences)
    exit_on_bus_error()
    with busy(f"loading {args.model}"):
        model = Model(args.model, args.backend, engine, _tell)
    trained = model.config.context_length
    if context is not None and context > trained:
        say(f"a context of {context:,} tokens: the model was trained for {trained:,}")
    return model


def engine_of(
    args: argparse.Namespace, context: int | None, sequences: int | None = None
) -> EngineConfig:
    """How the arguments say a model is run."""
    return EngineConfig(
        activation_bits=args.activation_bits,
        threads=args.threads,
        context=context,
        allow_inexact=args.allow_inexact,
        **sizes(args, sequences),
    )


class Sizes(TypedDict, total=False):
    """What EngineConfig says of sizes, but for the context, and over what a model is spread."""

    max_sequences: int
    chunk: int
    pages: int | None
    parts: int
    expert_shares: tuple[int, ...]
    stages: tuple[str, ...]
    stage_key: bytes


def sizes(args: argparse.Namespace, sequences: int | None = None, *, spread: bool = True) -> Sizes:
    """What the arguments say of these; ``sequences`` where they do not say how many, ``spread``:
    whether the model is to be."""
    found = Sizes(
        max_sequences=sequences or args.sequences,
        chunk=args.chunk,
        pages=None if args.cache is None else -(-args.cache // TILE),
    )
    if spread:
        found |= Sizes(parts=args.parts, expert_shares=args.expert_shares, stages=args.hosts)
        if any(not host.startswith("ray:") for host in args.hosts):
            found["stage_key"] = stage_key(args.stage_key_env)
    return found


def _tell(note: str) -> None:
    """Pass a note on; that there is no GPU to use is no news on a machine without one."""
    if not isinstance(note, FallbackNote) or not note.startswith("backend auto: using cpu"):
        say(note)
    elif found := gpus():
        say(f"running on the CPU, not the GPU ({found[0]}): {note}")


def add_prompt(
    parser: argparse.ArgumentParser, *flags: str, required: bool, text: str = "the prompt"
) -> None:
    """The prompt, in one of three ways; ``flags`` are those of the first."""
    group = parser.add_argument_group("prompt").add_mutually_exclusive_group(required=required)
    group.add_argument(
        *flags, dest="prompt", metavar="TEXT", help=f"{text}; - reads standard input"
    )
    group.add_argument(
        "--prompt-file", metavar="FILE", help=f"{text}: a UTF-8 file, - for standard input"
    )
    group.add_argument(
        "--tokens", type=_token_ids, metavar="IDS", help="token ids instead: 785,921,308"
    )


def read_prompt(args: argparse.Namespace) -> str | list[int] | None:
    """The prompt as text or token ids; None if none was given."""
    if args.prompt_file is not None or args.prompt == "-":
        return read_text(args.prompt_file or "-")
    prompt: str | list[int] | None = args.tokens if args.prompt is None else args.prompt
    return prompt


def read_text(path: str) -> str:
    """A UTF-8 file, or standard input for ``-``."""
    name = "standard input" if path == "-" else path
    try:
        if path == "-":
            if sys.stdin.isatty():
                say("reading from the terminal; Ctrl-D at the beginning of a line ends it")
            data = sys.stdin.buffer.read(PROMPT_LIMIT + 1)
        else:
            if is_named_pipe(path):
                raise OSError(errno.ESPIPE, "a named pipe; send it to standard input, -")
            with Path(path).open("rb") as opened:
                data = opened.read(PROMPT_LIMIT + 1)
        if len(data) <= PROMPT_LIMIT:
            return data.decode()
    except UnicodeDecodeError as error:
        found = f"{error.reason} at byte {error.start}"
        raise UsageError(f"{name}: expected UTF-8 text, got {found}") from None
    except FileNotFoundError:
        raise UsageError(no_such_file(path)) from None
    except OSError as error:
        raise UsageError(f"{name}: expected a readable file, got: {error.strerror}") from None
    except ValueError as error:  # a NUL in the path
        raise UsageError(f"{name}: expected a file name, got: {error}") from None
    raise UsageError(f"{name}: expected a prompt of at most {PROMPT_LIMIT} bytes, got more")


def output_file(path: str) -> str:
    """A file that a run writes at its end, refused before it begins if that will fail."""
    file = Path(path)
    found = "a folder" if file.is_dir() else "a named pipe" if is_named_pipe(file) else ""
    if not found and not file.parent.is_dir():
        found = f"no folder {str(file.parent)!r}"
    if found:
        raise argparse.ArgumentTypeError(f"cannot write {path!r}: expected a file, got {found}")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write {path!r}: no permission")
    return path


def whole_file(path: str) -> str:
    """:func:`output_file`, of what is written beside its place and renamed: over no device."""
    output_file(path)
    if Path(path).exists() and not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"cannot write {path!r}: expected a file, got a device")
    return path


_SAMPLING = {
    "temperature": ("temp", "0 takes the likeliest token"),
    "top_k": ("top_k", "keep the K likeliest tokens; 0 keeps all"),
    "top_p": ("top_p", "keep the fewest tokens whose probabilities reach this sum"),
    "min_p": ("min_p", "keep tokens at least this fraction as likely as the likeliest"),
    "repeat_penalty": ("penalty_repeat", "make tokens that occurred less likely; 1 does not"),
}
"""Fields of Sampling: the key of a model file (``general.sampling.…``) and what it does."""


def add_sampling(parser: argparse.ArgumentParser, *, recommended: bool = False) -> None:
    """How tokens are chosen; ``recommended`` leaves room for what the model's file recommends."""
    group = parser.add_argument_group("sampling")
    for name, (_, text) in _SAMPLING.items():
        default = getattr(Sampling, name)
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=at_least(0) if name == "top_k" else decimal,
            default=None if recommended else default,
            metavar="X",
            help=f"{text} (default: {'the file’s, or ' if recommended else ''}{default})",
        )
    group.add_argument(
        "--seed",
        type=at_least(0),
        metavar="X",
        help="random seed; the same seed gives the same text (default: a new one each time)",
    )
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        type=_stop,
        metavar="TEXT",
        help="stop when this text appears (not printed); repeatable",
    )


def settings(args: argparse.Namespace) -> Settings:
    """The arguments of ``add_sampling``, and ``--max-tokens``, as ``Model.stream`` takes them.

    Ask before a model is opened: what is out of range is refused here, and loading takes time.
    """
    given = {name: value for name in _SAMPLING if (value := getattr(args, name)) is not None}
    Sampling(**given, seed=args.seed)
    chosen: Settings = {"max_tokens": args.max_tokens, "seed": args.seed, "stop": args.stop}
    chosen.update(given)  # type: ignore[typeddict-item]
    return chosen


def recommended(metadata: Mapping[str, object], chosen: Settings) -> dict[str, float]:
    """The sampling that a model's file recommends, where ``chosen`` says nothing.

    A value that is out of range is left out, and said: it is advice, and no reason to refuse the
    model.
    """
    found: dict[str, float] = {}
    for name, (key, _) in _SAMPLING.items():
        full = f"general.sampling.{key}"
        if name in chosen or full not in metadata:
            continue
        try:
            checked_sampling(None, **{name: metadata[full]})  # type: ignore[arg-type]
        except UsageError as error:
            say(f"the file's {full} is not followed: {error}")
        else:
            found[name] = metadata[full]  # type: ignore[assignment]
    return found


def words(sampling: Mapping[str, float]) -> str:
    """Sampling settings for people: "temperature 0.7, top-p 0.8, as the file recommends"."""
    shown = ", ".join(f"{name.replace('_', '-')} {v:g}" for name, v in sampling.items())
    return f"{shown}, as the file recommends" if shown else ""


def at_least(least: int, most: int | None = None) -> Callable[[str], int]:
    """An argument's type: a whole number that is not below ``least``, nor above ``most``."""
    which = f"{least} or more" if most is None else f"{least} to {most}"

    def parse(text: str) -> int:
        with suppress(ValueError):
            if (n := int(text)) >= least and (most is None or n <= most):
                return n
        raise argparse.ArgumentTypeError(f"expected a whole number, {which}; got {_cut(text)}")

    return parse


def whole(text: str) -> int:
    """An argument's type: a whole number; what it may be is the library's to say."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {_cut(text)}") from None


def decimal(text: str) -> float:
    """An argument's type: a number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {_cut(text)}") from None


def share(text: str) -> float:
    """An argument's type: a share of a whole, 0 to 1."""
    with suppress(ValueError):
        if 0 <= (x := float(text)) <= 1:
            return x
    raise argparse.ArgumentTypeError(f"expected a share from 0 to 1, got {_cut(text)}")


def _stop(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("expected a text, got an empty one")
    return text


def _cut(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")


def _token_ids(text: str) -> list[int]:
    return comma_list(text, "token ids: expected numbers with commas, such as 785,921,308")


def comma_list(text: str, complaint: str) -> list[int]:
    """Integers with commas between them."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{complaint}; got {_cut(text)}") from None
