"""``isobit chat``: a conversation in the model's own template."""

import argparse
import difflib
import select
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from isobit.cli import options, prompt_options, sampling_options, say
from isobit.cli.output import visible
from isobit.cli.run import Ids, add_length, follow, has_text, report_speed
from isobit.cli.stream_printer import StreamPrinter, message, read_json
from isobit.errors import IsobitError, UsageError, did_you_mean
from isobit.runtime.generation import Completion, Settings
from isobit.runtime.model import Model
from isobit.server.parsing.events import Call
from isobit.server.request.chat import Chat, begun
from isobit.server.request.fields import ChatRequest
from isobit.server.tool_calls.tools import checked

PROMPT = "> "
HELP = """\
A message is a line; several lines that are pasted are one message.
\"\"\"            begins and ends a message of several lines (Ctrl-D ends it, too)
/clear         begin a new conversation
/system TEXT   begin a new conversation with this system message
/stats         tokens and speed of the last answer
/help          this
/quit, Ctrl-D  leave
Ctrl-C         stop the answer; what was said of it stays"""


_QUIT = ("/quit", "/exit", "/bye")
_COMMANDS = ("/clear", "/system", "/stats", "/help", "/?", *_QUIT)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = (
        "Talk with a model. Without a prompt it asks for messages until Ctrl-D (or, when standard "
        "input is not a terminal, answers all of it as one message); with one, it answers that. "
        "Sampling is as the model's file recommends, where it does and no option says otherwise."
    )
    options.add_model(parser)
    prompt_options.add_prompt(parser, "-p", "--prompt", required=False, text="the only message")
    parser.add_argument("--system", metavar="TEXT", help="the system message (default: none)")
    parser.add_argument(
        "--tools",
        metavar="FILE",
        help="functions the model may call, a list in JSON as OpenAI's interface has it; you are "
        "asked for what a call gives",
    )
    parser.add_argument(
        "--chat-template-kwargs",
        metavar="JSON",
        help="more variables for the chat template, such as '{\"enable_thinking\": false}'",
    )
    add_length(parser, 512)
    sampling_options.add_sampling(parser, recommended=True)
    options.add_engine(parser)
    options.add_inexact(parser)
    options.add_context(parser)


def main(args: argparse.Namespace) -> None:
    """Run the command."""
    prompt = prompt_options.read_prompt(args)
    if prompt is None and not sys.stdin.isatty():
        prompt = prompt_options.read_text("-")
    if isinstance(prompt, list) and args.system is not None:
        raise UsageError("--tokens: expected a whole conversation, so no --system beside it")
    if isinstance(prompt, str) and not prompt.strip():
        raise UsageError("expected a message, got an empty one")
    settings, asked = sampling_options.settings(args), _asked(args)
    with options.open_model(args, args.context) as model:
        advice = sampling_options.recommended(model.file.metadata, settings)
        settings.update(advice)  # type: ignore[typeddict-item]
        if prompt is None:
            Conversation(model, settings, args.system, asked).run(sampling_options.words(advice))
        else:
            if isinstance(prompt, str):
                messages = [*_system(args.system), {"role": "user", "content": prompt}]
                chat = begun(model, ChatRequest(messages=messages, **asked))
            else:
                chat = Chat(model, prompt)
            printer = StreamPrinter(chat)
            write = printer.write if has_text(model) else Ids()
            completion = follow(model, chat.prompt, settings, write)
            printer.end(cut=completion.finish_reason != "stop")
            if completion.finish_reason == "interrupted":
                raise KeyboardInterrupt(f"after {len(completion.token_ids)} tokens")
            report_speed(completion)


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    """What is asked of each answer beside messages."""
    found: dict[str, Any] = {}
    if args.tools is not None:
        found["tools"] = read_json(prompt_options.read_text(args.tools), "--tools", list)
        if not all(isinstance(tool, dict) for tool in found["tools"]):
            raise UsageError("--tools: expected a list of functions")
        checked(found["tools"], None, parallel=True)
    if args.chat_template_kwargs is not None:
        text = args.chat_template_kwargs
        found["chat_template_kwargs"] = read_json(text, "--chat-template-kwargs", dict)
    if args.tokens is not None and found:
        raise UsageError("--tokens: expected a whole conversation, so nothing for its template")
    return found


def _system(text: str | None) -> list[dict[str, str]]:
    return [] if text is None else [{"role": "system", "content": text}]


class Conversation:
    """Asks for messages and answers them; a turn that fails is taken back, and it goes on."""

    def __init__(
        self, model: Model, settings: Settings, system: str | None, asked: Mapping[str, Any]
    ) -> None:
        self._model = model
        self._asked = asked
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
            if text in _QUIT:
                return
            if _is_command(text):
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
            near = did_you_mean(command, _COMMANDS)
            say(f"no such command: {visible(command, 40)}{near}; /help lists them")

    def _turn(self, text: str) -> None:
        messages: list[dict[str, Any]] = [*self._history, {"role": "user", "content": text}]
        try:
            while calls := self._answered(messages):
                for call in calls:
                    given = input(f"{visible(call.name, 40)} gives{PROMPT}")
                    messages.append({"role": "tool", "tool_call_id": call.id, "content": given})
        except (KeyboardInterrupt, EOFError):
            print()
            say("stopped before the first word; the message is taken back")
        except IsobitError as error:
            say(f"error: {error}; the message is taken back (/clear begins anew)")
        else:
            self._history = messages

    def _answered(self, messages: list[dict[str, Any]]) -> list[Call]:
        """Add an answer; the calls in it that wait for what they give."""
        chat = begun(self._model, ChatRequest(messages=messages, **self._asked))
        printer = StreamPrinter(chat)
        self._last = done = follow(self._model, chat.prompt, self._settings, printer.write)
        answer = printer.end(cut=done.finish_reason != "stop")
        messages.append(message(answer))
        if done.finish_reason == "interrupted":
            say("stopped")
        elif done.finish_reason == "length":
            say(done.note or f"cut at {len(done.token_ids)} tokens (-n); /stats, /help")
        else:
            return [call for call in answer.calls if call.complete]
        return []


def _is_command(text: str) -> bool:
    """Whether a line is for the program, known or mistyped; ``/usr/bin is …`` is a message."""
    word, _, rest = text.partition(" ")
    if "\n" in text or not word.startswith("/"):
        return False
    near = bool(difflib.get_close_matches(word, _COMMANDS, 1, 0.75))
    return word in _COMMANDS or near or (word[1:].isalpha() and not rest)


def _read() -> str:
    """One message: a line, what was pasted with it, or what stands between triple quotes.

    Ctrl-D ends a message that was begun, too.
    """
    lines = [input(PROMPT)]
    if lines[0].lstrip().startswith('"""'):
        lines[0] = lines[0].lstrip()[3:]
        while not lines[-1].rstrip().endswith('"""'):
            try:
                lines.append(input("… "))
            except EOFError:
                print()
                return "\n".join(lines).strip()
        lines[-1] = lines[-1].rstrip()[:-3]
        return "\n".join(lines).strip()
    while sys.stdin in select.select([sys.stdin], [], [], 0.03)[0]:
        try:
            lines.append(input())
        except EOFError:
            break
    return "\n".join(lines).strip()
