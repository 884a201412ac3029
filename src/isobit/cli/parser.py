"""The argument parser: argparse, with complaints that show the way on.

argparse names what is missing before what is misspelt, points at the help of the whole program
instead of the command's, and reads ``-ngl 99`` as ``-n gl``. So what it would not understand is
looked for first. Nor would it take ``FILE -o OUT MODEL``, as it gives what may be left out nothing
where an option stands, so that what is no option is moved before them all.
"""

import argparse
import re
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from isobit.errors import UsageError, did_you_mean

LONGEST = 200  # characters of a complaint that may repeat what was typed

_ELSEWHERE = {
    "--temp": "--temperature",
    "-s": "--seed",
    "--n-predict": "--max-tokens",
    "--max-new-tokens": "--max-tokens",
    "--predict": "--max-tokens",
    "--ctx-size": "--context",
    "--max-model-len": "--context",
    "-f": "--prompt-file",
    "--file": "--prompt-file",
    "--system-prompt": "--system",
    "-sys": "--system",
    "--device": "--backend",
}
"""Options of other programs, and what they are called here."""

_UNNEEDED = {
    "-m": "MODEL is written without an option",
    "--model": "MODEL is written without an option",
    "-ngl": "a model is on one device as a whole: --backend cuda, or cpu",
    "--n-gpu-layers": "a model is on one device as a whole: --backend cuda, or cpu",
    "-fa": "there is one attention, on every backend the same",
    "--flash-attn": "there is one attention, on every backend the same",
}
"""Options of other programs that have no counterpart."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line of the usual form."""

    positionals: Sequence[str] = ()
    """What was given beside the options, as :meth:`check` found it."""
    ordered: Sequence[str] = ()
    """All that was given, these before the options."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError."""
        message = message.removeprefix("argument ")
        if "-p/--prompt" in message and message.endswith("is required"):
            message = self._prompt_missing()
        self.refuse(message if len(message) <= LONGEST else message[:LONGEST] + "…")

    def refuse(self, message: str) -> NoReturn:
        """Raise UsageError with all of a message."""
        raise UsageError(f"{message}; see {self.prog} --help")

    def _prompt_missing(self) -> str:
        """A text given where MODEL belongs is the likely reason."""
        message = "expected a prompt: -p TEXT, --prompt-file FILE or --tokens IDS"
        first = self.positionals[0] if self.positionals else "sample"
        if first != "sample" and not first.endswith(".gguf") and not Path(first).exists():
            return f"{message}; did you mean -p {_short(first)!r}?"
        return message

    def check(self, argv: Sequence[str]) -> "Parser":
        """Refuse commands and options that do not exist; the parser that the rest is meant for."""
        parser, commanded, positionals, given = self, list[str](), list[str](), list[str]()
        rest = deque(argv)
        while rest:
            arg, commands = rest.popleft(), parser._commands()
            if arg == "--":
                given += [arg, *rest]
                break
            if _is_option(arg):
                given += [arg, *parser._check_option(arg, rest)]
            elif not commands:
                positionals.append(arg)
            elif arg in commands:
                parser = commands[arg]
                commanded, given = [*commanded, *given, arg], []
            else:
                near = did_you_mean(arg, commands)
                known = "" if near else f"; there are {', '.join(commands)}"
                parser.refuse(f"no such command: {_short(arg)!r}{near or known}")
        parser.positionals, parser.ordered = positionals, [*commanded, *positionals, *given]
        return parser

    def _commands(self) -> "dict[str, Parser]":
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return dict(action.choices)
        return {}

    def _check_option(self, arg: str, rest: deque[str]) -> list[str]:
        """Refuse an unknown option; the value of a known one, if it comes next."""
        options = self._option_string_actions
        name, equals, _ = arg.partition("=")
        action = options.get(name)
        if action is None and not arg.startswith("--") and arg[:2] in options:  # -n5
            attached, equals = options[arg[:2]], "="
            if attached.nargs is None and _accepts(attached, arg[2:]):
                action = attached
        if action is None:
            self.error(f"no such option: {_short(name)}{self._tip(name)}")
        takes = action.nargs is None or (
            action.nargs == "?" and not _is_option(rest[0] if rest else "")
        )
        return [rest.popleft()] if takes and rest and not equals else []

    def _tip(self, name: str) -> str:
        options = self._option_string_actions
        if name in _UNNEEDED:
            return f" ({_UNNEEDED[name]})"
        if (known := _ELSEWHERE.get(name)) in options:
            return f"; did you mean {known}?"
        if "--" + name.lstrip("-").replace("_", "-") in options:
            return f"; did you mean --{name.lstrip('-').replace('_', '-')}?"
        return did_you_mean(name, [o for o in options if o.startswith("--")]).replace("'", "")


def _is_option(arg: str) -> bool:
    """As argparse decides it: a negative number or a text with a space is none."""
    return len(arg) > 1 and arg[0] == "-" and " " not in arg and not re.match(r"-\.?\d", arg)


def _accepts(action: argparse.Action, text: str) -> bool:
    """Whether a text may be the value of an option."""
    if callable(action.type):
        with suppress(argparse.ArgumentTypeError, ValueError, TypeError):
            action.type(text)
            return True
        return False
    return action.choices is None or text in action.choices


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:60] + "…"


def in_options(parser: argparse.ArgumentParser, message: str) -> str:
    """A complaint of the library in the words of the command line: "top_p: …" as "--top-p: …"."""
    names, colon, rest = message.partition(":")
    words = {
        a.dest: next(o for o in a.option_strings if o.startswith("--"))
        for a in parser._actions
        if any(o.startswith("--") for o in a.option_strings)
        and a.dest not in ("prompt", "tokens")
        and a.help is not argparse.SUPPRESS  # a former name
    }
    found = [words.get(name.strip()) for name in names.split(",")]
    if not colon or None in found:
        return message
    return f"{', '.join(str(f) for f in found)}:{rest}"
