"""``isobit chat``: a conversation in the model's own template."""

import argparse
import sys
from contextlib import suppress

from isobit.cli import options
from isobit.cli.run import add_length, follow, report_speed
from isobit.errors import UsageError
from isobit.runtime.generation import Completion, Settings
from isobit.runtime.model import Model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = (
        "Talk with a model. Without a prompt it asks for messages until Ctrl-D (or, when standard "
        "input is not a terminal, answers all of it as one message); with one, it answers that."
    )
    options.add_model(parser)
    options.add_prompt(parser, "-p", "--prompt", required=False, text="the only message")
    parser.add_argument("--system", metavar="TEXT", help="the system message (default: none)")
    add_length(parser, 512)
    options.add_sampling(parser)
    options.add_engine(parser)
    options.add_inexact(parser)
    options.add_context(parser)


def main(args: argparse.Namespace) -> None:
    """Run the command."""
    prompt = options.read_prompt(args)
    if prompt is None and not sys.stdin.isatty():
        prompt = options.read_text("-")
    history = [{"role": "system", "content": args.system}] if args.system is not None else []
    if isinstance(prompt, list) and history:
        raise UsageError("--tokens: expected a whole conversation, so no --system beside it")
    settings = options.settings(args)
    with options.open_model(args, args.context) as model:
        if isinstance(prompt, list):
            _answer(model, prompt, settings)
        elif prompt is not None:
            asked = [*history, {"role": "user", "content": prompt}]
            _answer(model, model.chat_ids(asked), settings)
        else:
            _converse(model, history, settings)


def _converse(model: Model, history: list[dict[str, str]], settings: Settings) -> None:
    with suppress(ImportError):
        import readline  # noqa: F401, PLC0415 - gives input() a line editor
    while True:
        try:
            text = input("> ")
        except EOFError:
            print()
            return
        if not text.strip():
            continue
        history.append({"role": "user", "content": text})
        answer = _answer(model, model.chat_ids(history), settings)
        history.append({"role": "assistant", "content": answer.text})


def _answer(model: Model, ids: list[int], settings: Settings) -> Completion:
    with model.stream(ids, **settings) as stream:
        completion = follow(stream)
    report_speed(completion)
    return completion
