"""``isobit chat``: a conversation in the model's own template."""

import argparse
import select
import sys
from contextlib import suppress

from isobit.cli import options, say
from isobit.cli.output import visible
from isobit.cli.run import add_length, follow, report_speed
from isobit.errors import IsobitError, UsageError
from isobit.runtime.generation import Completion, Settings
from isobit.runtime.model import Model

PROMPT = "> "
HELP = """\
A message is a line; several lines that are pasted are one message.
\"\"\"            begins and ends a message of several lines
/clear         begin a new conversation
/system TEXT   begin a new conversation with this system message
/stats         tokens and speed of the last answer
/help          this
/quit, Ctrl-D  leave
Ctrl-C         stop the answer; what was said of it stays"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = (
        "Talk with a model. Without a prompt it asks for messages until Ctrl-D (or, when standard "
        "input is not a terminal, answers all of it as one message); with one, it answers that. "
        "Sampling is as the model's file recommends, where it does and no option says otherwise."
    )
    options.add_model(parser)
    options.add_prompt(parser, "-p", "--prompt", required=False, text="the only message")
    parser.add_argument("--system", metavar="TEXT", help="the system message (default: none)")
    add_length(parser, 512)
    options.add_sampling(parser, recommended=True)
    options.add_engine(parser)
    options.add_inexact(parser)
    options.add_context(parser)


def main(args: argparse.Namespace) -> None:
    """Run the command."""
    prompt = options.read_prompt(args)
    if prompt is None and not sys.stdin.isatty():
        prompt = options.read_text("-")
    if isinstance(prompt, list) and args.system is not None:
        raise UsageError("--tokens: expected a whole conversation, so no --system beside it")
    if isinstance(prompt, str) and not prompt.strip():
        raise UsageError("expected a message, got an empty one")
    settings = options.settings(args)
    with options.open_model(args, args.context) as model:
        advice = options.recommended(model.file.metadata, settings)
        settings.update(advice)  # type: ignore[typeddict-item]
        if prompt is None:
            Conversation(model, settings, args.system).run(options.words(advice))
        else:
            if isinstance(prompt, str):
                asked = [*_system(args.system), {"role": "user", "content": prompt}]
                prompt = model.chat_ids(asked)
            completion = follow(model, prompt, settings)
            if completion.finish_reason == "interrupted":
                raise KeyboardInterrupt(f"after {len(completion.token_ids)} tokens")
            report_speed(completion)


def _system(text: str | None) -> list[dict[str, str]]:
    return [] if text is None else [{"role": "system", "content": text}]


class Conversation:
    """Asks for messages and answers them; a turn that fails is taken back, and it goes on."""

    def __init__(self, model: Model, settings: Settings, system: str | None = None) -> None:
        self._model = model
        self._settings = settings
        self._system = system
        self._history = _system(system)
        self._last: Completion | None = None

    def run(self, sampling: str) -> None:
        """Talk until Ctrl-D, /quit, or Ctrl-C twice; ``sampling`` is said in the greeting."""
        with suppress(ImportError):
            import readline  # noqa: PLC0415 - gives input() a line editor

            readline.parse_and_bind("set enable-bracketed-paste on")
        how = f"; {sampling}" if sampling else ""
        where = f"{self._model.path.stem} on {self._model.backend.name}"
        say(f"{where}{how}; /help helps, Ctrl-D ends")
        asked_to_stop = False
        while True:
            try:
                text = _read()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
                if asked_to_stop:
                    return
                asked_to_stop = True
                say("Ctrl-C again, or Ctrl-D, ends")
                continue
            asked_to_stop = False
            if text in ("/quit", "/exit", "/bye"):
                return
            if text.startswith("/") and "\n" not in text:
                self._command(text)
            elif text:
                self._turn(text)

    def _command(self, text: str) -> None:
        command, _, rest = text.partition(" ")
        if command in ("/clear", "/system"):
            self._system = rest.strip() or None if command == "/system" else self._system
            self._history = _system(self._system)
            say("a new conversation")
        elif command == "/stats":
            if self._last is None:
                say("nothing was answered yet")
            else:
                report_speed(self._last)
        elif command in ("/help", "/?"):
            print(HELP)
        else:
            say(f"no such command: {visible(command, 40)}; /help lists them")

    def _turn(self, text: str) -> None:
        asked = [*self._history, {"role": "user", "content": text}]
        try:
            answer = follow(self._model, self._model.chat_ids(asked), self._settings)
        except KeyboardInterrupt:
            print()
            say("stopped before the first word; the message is taken back")
            return
        except IsobitError as error:
            say(f"error: {error}; the message is taken back (/clear begins anew)")
            return
        self._last = answer
        self._history = [*asked, {"role": "assistant", "content": answer.text}]
        if answer.finish_reason == "interrupted":
            say("stopped")
        elif answer.finish_reason == "length":
            say(answer.note or f"cut at {len(answer.token_ids)} tokens (-n); /stats, /help")


def _read() -> str:
    """One message: a line, what was pasted with it, or what stands between triple quotes."""
    lines = [input(PROMPT)]
    if lines[0].lstrip().startswith('"""'):
        lines[0] = lines[0].lstrip()[3:]
        while not lines[-1].rstrip().endswith('"""'):
            lines.append(input("… "))
        lines[-1] = lines[-1].rstrip()[:-3]
        return "\n".join(lines).strip()
    while sys.stdin in select.select([sys.stdin], [], [], 0.03)[0]:
        try:
            lines.append(input())
        except EOFError:
            break
    return "\n".join(lines).strip()
