"""The command line: which commands there are, and how each of them ends.

Owns the parser, the exit codes and what a person sees when something goes wrong. A command is a
module of this package with ``add_arguments(parser)`` and ``main(args)``, imported when it is asked
for; it calls the library and prints.
"""

import argparse
import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module

from isobit import __version__
from isobit.cli.parser import Parser, in_options
from isobit.errors import GateFailed, IsobitError, UsageError, printable

COMMANDS = {
    "run": "continue a prompt",
    "chat": "talk with a model",
    "serve": "answer OpenAI's interface over HTTP, with answers that can be checked",
    "front": "one address for several servers, whose streams outlive any of them",
    "batch": "answer a file of requests, each with a receipt; a share of them checked elsewhere",
    "stage": "run some layers of a model for whoever asks: a stage of a pipeline of machines",
    "pull": "bring a model from the Hugging Face hub into its cache",
    "models": "list or remove the models that were brought",
    "convert": "write a checkpoint of transformers as a GGUF file",
    "inspect": "show what a model file holds, and what of it would be refused",
    "tokenize": "show a text's token ids, or the text of ids",
    "devices": "show which backends run here, on what, and why others do not",
    "bench": "measure tokens per second (llama-bench's tests), or whole generations",
    "trace": "record the values of a run's stages in a file",
    "diff": "compare two traces: where they part, by how much, and what it changed",
    "verify": "compare a backend with another, bit for bit, and find the faulty operation",
    "replay": "compute a receipt again, on any backend",
    "perplexity": "measure how well a model predicts a text",
    "accuracy": "measure what the arithmetic costs against a float64 oracle, over a text",
    "ablate": "how much of the error does each operation cause?",
    "contract": "write, judge, check and amend contracts: what a backend promises",
    "import-trace": "turn another engine's folder of tensors into a trace",
    "completion": "print a script that completes isobit's options in a shell",
}

INTERRUPTED = 130  # what a shell reports for a process that SIGINT ended
PIPE_CLOSED = 141  # and SIGPIPE
EXIT_CODES = (
    "exit codes: 0 done, 1 a gate failed, 2 usage, 3 file or model refused, 4 backend not "
    f"available, 5 nothing was compared, 6 something was not run, {INTERRUPTED} interrupted, "
    f"{PIPE_CLOSED} the reader of the output went away"
)


def main(argv: Sequence[str] | None = None, *, interruptible: bool = False) -> int:
    """Run one command and return its exit code; ``argv`` is without the program's name.

    ``interruptible``: from here on Ctrl-C is Python's KeyboardInterrupt.
    """
    # Before NumPy is imported. Its BLAS multiplies small matrices here, for the reference and the
    # oracle, and with threads that wait for each other takes two to five times as long.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    for name, mode in (("stdin", "r"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the caller closed it
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115
    if sys.stdout is None:
        sys.stdout = _Closed()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a model writes what it likes
    try:
        if interruptible:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return _run(sys.argv[1:] if argv is None else argv)
    except IsobitError as error:  # a gate that failed is the answer to what was asked, no error
        say(str(error) if isinstance(error, GateFailed) else f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt as stop:
        if interruptible:  # the end is near: another ends it where it is, without a traceback
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        say(f"interrupted {stop}".rstrip())
        return INTERRUPTED
    except BrokenPipeError:
        _abandon_stdout()
        return PIPE_CLOSED
    except OSError as error:  # a full disk behind stdout, and the like
        _abandon_stdout()
        say(f"error: {error.filename or 'output'}: {error.strerror or error}")
        return UsageError.exit_code
    except MemoryError:
        say("error: expected enough memory, found too little; try a smaller --context")
        return UsageError.exit_code


def _run(argv: Sequence[str]) -> int:
    try:
        parser = _parser(argv)
        asked = parser.check(argv)
        args, extras = parser.parse_known_args(asked.ordered)
        args.argv = list(argv)
        if extras:
            asked.error(f"expected no more than was given, got {extras[0][:60]!r} too")
        try:
            args.main(args)
        except UsageError as error:
            raise UsageError(in_options(asked, str(error))) from None
        except SystemExit as end:  # of another's code: what was asked was not done
            raise UsageError(
                f"{args.command}: expected to come to its end, got SystemExit: {end.code}"
            ) from None
    except SystemExit as end:  # argparse, after --help and --version
        return end.code if isinstance(end.code, int) else 0
    finally:
        sys.stdout.flush()  # here, where a failure is still reported
    return 0


def say(line: str) -> None:
    """Print one line to stderr; control characters, which may come from a file, are escaped."""
    with suppress(OSError):
        print(f"isobit: {printable(line)}", file=sys.stderr, flush=True)


def _parser(argv: Sequence[str]) -> Parser:
    """The parser of all commands, with the arguments of the one that ``argv`` asks for."""
    parser = Parser(
        prog="isobit",
        description="Run quantized Mixture-of-Experts models: the same bits on every backend.",
        epilog=EXIT_CODES,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"isobit {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    asked = next((a for a in argv if not a.startswith("-")), None)
    for name, line in COMMANDS.items():
        sub = commands.add_parser(
            name, help=line, description=line, epilog=EXIT_CODES, allow_abbrev=False
        )
        if name == asked:
            module = import_module(f"isobit.cli.{name.replace('-', '_')}")
            module.add_arguments(sub)
            sub.set_defaults(main=module.main)
    return parser


def options_of(command: str, *, former: bool = True) -> dict[str, Callable[[str], bool]] | None:
    """The options of a command ("run", "contract check"), each with a test of whether it takes a
    value; None if there is no such command. former: those too that help does not name."""
    parser = _parser_of(command)
    if parser is None:
        return None
    return {
        option: partial(_takes, a)
        for option, a in parser._option_string_actions.items()
        if former or a.help is not argparse.SUPPRESS
    }


def values_of(command: str) -> dict[str, list[str]]:
    """What may follow an option of a command, where that is a list of words; under "" what may
    follow the command itself."""
    parser = _parser_of(command)
    found: dict[str, list[str]] = {}
    for action in parser._actions if parser else ():
        if (allowed := _allowed(action)) is not None:
            found |= {option: [str(v) for v in allowed] for option in action.option_strings or [""]}
    return found


def _parser_of(command: str) -> argparse.ArgumentParser | None:
    """A parser of one command's arguments; None if there is no such command."""
    name, _, action = command.partition(" ")
    if name not in COMMANDS:
        return None
    parser = Parser()
    import_module(f"isobit.cli.{name.replace('-', '_')}").add_arguments(parser)
    if not action:
        return parser
    inner = [a.choices for a in parser._actions if isinstance(a.choices, dict)]
    return inner[0].get(action) if inner else None


def _allowed(action: argparse.Action) -> Iterable[object] | None:
    """The values that an argument may have; None: any."""
    from isobit.backend_names import BACKENDS, VARIANTS  # noqa: PLC0415 - help goes without NumPy

    known = {"backend": ("auto", *BACKENDS, *VARIANTS), "activation_bits": (8, 16)}
    return action.choices if action.choices is not None else known.get(action.dest)


def _takes(action: argparse.Action, value: str) -> bool:
    """Whether an option takes a value; one that takes none is followed by anything."""
    if action.nargs == 0:
        return True
    try:
        made = action.type(value) if callable(action.type) else value
    except (ValueError, argparse.ArgumentTypeError, UsageError):
        return False
    allowed = _allowed(action)
    return allowed is None or made in allowed


class _Closed(io.TextIOBase):
    """A stream that the caller closed: what is written to it would be lost without a word."""

    def write(self, _text: str) -> int:
        raise OSError(errno.EBADF, "standard output is closed")


def _abandon_stdout() -> None:
    """Point stdout nowhere, so that flushing what is left at exit does not fail again."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
