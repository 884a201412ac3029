"""Options that several commands share, and what is made of them."""

import argparse
import gc
import os
from typing import TypedDict

from isobit.backend_names import BACKENDS, VARIANTS
from isobit.backends import NoGpuNote
from isobit.backends.cpu._cpu import exit_on_bus_error
from isobit.backends.hardware import gpus
from isobit.cli import argtypes, say
from isobit.cli.output import busy
from isobit.config import MOST_PAGES, MOST_POSITIONS, EngineConfig, bits_of_planes
from isobit.errors import UsageError
from isobit.numerics import KV_PAGE
from isobit.runtime.model import Model
from isobit.runtime.scheduler import Limits

_FEW, _MANY = EngineConfig.max_sequences, Limits.running


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


def add_sizes(parser: argparse._ActionsContainer) -> None:
    """Of a pass, and of the KV cache."""
    parser.add_argument(
        "--chunk",
        type=argtypes.whole,
        metavar="N",
        default=EngineConfig.chunk,
        help="prompt tokens in a pass (default: %(default)s)",
    )
    parser.add_argument(
        "--cache",
        type=argtypes.at_least(1, MOST_PAGES * KV_PAGE),
        metavar="N",
        help="tokens of all sequences together that the KV cache has room for (default: enough for "
        "sequences of full length, as far as the memory goes)",
    )


def add_engine(
    parser: argparse.ArgumentParser,
    *,
    bits: bool = True,
    backend: str = "auto",
    sequences: int | None = 1,
) -> None:
    """How the model is run; ``bits=False`` and ``sequences=None`` where something else says how
    many; ``sequences=0``: as many as there is room for."""
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--backend",
        default=backend,
        help=f"auto (the fastest that runs here), {', '.join(BACKENDS)}, or {', '.join(VARIANTS)}, "
        "operation by operation, every stage of which can be traced (default: %(default)s)",
    )
    if bits:
        add_activation_bits(group)
    group.add_argument(
        "-t",
        "--threads",
        type=argtypes.whole,
        metavar="N",
        help="CPU threads (default: every usable core; fewer may be faster where cores are shared)",
    )
    add_sizes(group)
    if sequences is not None:
        group.add_argument(
            "--sequences",
            type=argtypes.at_least(1, MOST_POSITIONS),
            metavar="N",
            default=sequences,
            help=f"sequences that run together (default: {sequences})"
            if sequences
            else "so many of full length have room in the KV cache, and a GPU is fastest up to as "
            f"many (default: {_FEW} to {_MANY}, as the memory has room); up to {_MANY} run "
            "together, or N if that is more",
        )
    group.add_argument(
        "--parts",
        type=argtypes.whole,
        metavar="N",
        default=EngineConfig.parts,
        help="processes that cpu, GPUs that cuda is split over (default: %(default)s)",
    )
    group.add_argument(
        "--shares",
        type=_shares,
        metavar="N,…",
        default=(),
        help="the parts have heads and columns about in these proportions (default: evenly)",
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


def add_activation_bits(
    group: argparse._ActionsContainer,
    of: str = "",
    default: int | None = EngineConfig.activation_bits,
    about: str = "bits of an activation: 16, or 8, which is faster and coarser "
    "(default: %(default)s)",
) -> None:
    """How finely activations are kept; ``of``: before the option's name."""
    flag = f"--{of}activation-bits"
    group.add_argument(flag, type=_bits, metavar="N", default=default, help=about)
    former = f"--{of}planes", f"--{of}activation-planes"
    add_planes(group, *former, to=f"{of}activation_bits".replace("-", "_"))


def _bits(text: str) -> int:
    if (bits := argtypes.whole(text)) in (8, 16):
        return bits
    raise argparse.ArgumentTypeError(f"expected 8 or 16, got {bits}")


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
                return [
                    bits_of_planes(n)
                    for n in argtypes.comma_list(text, "planes: expected 1, 2 or 1,2")
                ]
            return bits_of_planes(argtypes.whole(text))
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
        "--port",
        type=argtypes.at_least(0, 65535),
        default=8000,
        metavar="N",
        help="(default: %(default)s)",
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
        type=argtypes.at_least(0),
        default=10,
        metavar="SECONDS",
        help="what runs may go on for so long after SIGTERM or Ctrl-C (default: %(default)s)",
    )


def secret(variable: str) -> str:
    """The key in an environment variable, without the line's end that a file of it may have. Raises
    UsageError if there is none."""
    key = os.environ.get(variable, "").strip()
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
        "-c",
        "--context",
        type=argtypes.whole,
        metavar="N",
        help="longest sequence (default: the model's)",
    )


def open_model(
    args: argparse.Namespace, context: int | None, sequences: int | None = None
) -> Model:
    """The model that the arguments ask for, with room for sequences of ``context`` tokens."""
    engine = engine_of(args, context, sequences)
    exit_on_bus_error()
    with busy(f"loading {args.model}"):
        model = Model(args.model, args.backend, engine, _tell)
    if not gc.isenabled():  # a process of our own (__main__.py): what is there now stays
        gc.freeze()
        gc.enable()
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
    most_sequences: int | None
    chunk: int
    pages: int | None
    parts: int
    shares: tuple[int, ...]
    expert_shares: tuple[int, ...]
    stages: tuple[str, ...]
    stage_key: bytes


def sizes(args: argparse.Namespace, sequences: int | None = None, *, spread: bool = True) -> Sizes:
    """What the arguments say of these; ``sequences`` where they do not say how many, ``spread``:
    whether the model is to be."""
    many = sequences or args.sequences
    found = Sizes(
        max_sequences=many or _FEW,
        most_sequences=None if many else _MANY,
        chunk=args.chunk,
        pages=None if args.cache is None else -(-args.cache // KV_PAGE),
    )
    if spread:
        found |= Sizes(parts=args.parts, shares=args.shares, expert_shares=args.expert_shares)
        found["stages"] = args.hosts
        if any(not host.startswith("ray:") for host in args.hosts):
            found["stage_key"] = stage_key(args.stage_key_env)
    return found


def _tell(note: str) -> None:
    """Pass a note on; that there is no GPU to use is no news on a machine without one."""
    if not isinstance(note, NoGpuNote):
        say(note)
    elif found := gpus():
        say(f"running on the CPU, not the GPU ({found[0]}): {note}")
