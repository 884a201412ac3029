"""The prompt, as text, from a file, or as token ids."""

import argparse
import errno
import sys
from pathlib import Path

from isobit.cli import argtypes, say
from isobit.errors import UsageError, no_such_file
from isobit.files import is_named_pipe

PROMPT_LIMIT = 16 << 20  # bytes; the longest contexts hold a tenth of it


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


def _token_ids(text: str) -> list[int]:
    return argtypes.comma_list(text, "token ids: expected numbers with commas, such as 785,921,308")
