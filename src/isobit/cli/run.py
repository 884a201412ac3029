"""``isobit run``: continue a prompt, the text on stdout as it comes, the speed on stderr.

Of a model without a tokenizer it is token ids, one a line.
"""

import argparse
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from isobit.cli import argtypes, options, prompt_options, sampling_options, say
from isobit.cli.output import busy, count, shown_as_is
from isobit.errors import ModelRefused, UsageError
from isobit.runtime.generation import Completion, Settings, Stream
from isobit.runtime.model import Model

if TYPE_CHECKING:
    from isobit.verify.receipt import Recorder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    options.add_model(parser)
    prompt_options.add_prompt(parser, "-p", "--prompt", required=True)
    add_length(parser, 128)
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--json", action="store_true", help="print one JSON object when done, instead of the text"
    )
    form.add_argument(
        "--jsonl",
        action="store_true",
        help="print a JSON object for each token as it comes, and one with the totals",
    )
    parser.add_argument(
        "--experts", action="store_true", help="with --jsonl: name each token's experts, by layer"
    )
    parser.add_argument(
        "--receipt",
        type=argtypes.output_file,
        metavar="FILE",
        help="write what isobit replay needs to compute this again",
    )
    parser.add_argument(
        "--routes",
        type=argtypes.whole_file,
        metavar="FILE",
        help="write each token's experts (safetensors)",
    )
    parser.add_argument(
        "--logprobs",
        type=argtypes.at_least(0),
        metavar="K",
        help="with --json or --jsonl: log-probabilities of each token and of the K most likely "
        "(--jsonl without it: of each token)",
    )
    sampling_options.add_sampling(parser)
    options.add_engine(parser)
    options.add_inexact(parser)
    options.add_context(parser)


def add_length(parser: argparse.ArgumentParser, default: int) -> None:
    """The most tokens to generate."""
    parser.add_argument(
        "-n",
        "--max-tokens",
        type=_length,
        default=default,
        metavar="N",
        help="most tokens to generate; -1: until the model ends (default: %(default)s)",
    )


def _length(text: str) -> int | None:
    n = argtypes.at_least(-1, which="0 or more, or -1")(text)
    return None if n == -1 else n


def main(args: argparse.Namespace) -> None:
    """Run the command."""
    prompt = prompt_options.read_prompt(args)
    assert prompt is not None
    if args.experts and not args.jsonl:
        raise UsageError("--experts: expected --jsonl beside it")
    if args.logprobs is not None and not (args.json or args.jsonl):
        raise UsageError("--logprobs: expected --json or --jsonl beside it")
    settings = sampling_options.settings(args)
    if args.jsonl and args.logprobs is None:
        args.logprobs = 0
    with options.open_model(args, args.context) as model:
        ids = model.tokenize(prompt) if isinstance(prompt, str) else prompt
        watch = _recorder() if args.receipt or args.routes or args.experts else None
        settings["watch"] = watch
        settings["logprobs"] = args.logprobs
        write: Write | None = _nothing if args.json else None
        if args.jsonl:
            write = _Events(watch if args.experts else None)
        elif write is None and not has_text(model):
            write = Ids()
        completion = follow(model, ids, settings, write)
        if watch is not None and args.receipt:
            with busy("the digest of the model's file, for the receipt"):
                watch.receipt().save(args.receipt)
        if watch is not None and args.routes:
            watch.save_routes(args.routes)
        if args.json or args.jsonl:
            report = _report(model, args.model, ids, completion)
            print(json.dumps({"type": "done"} | report if args.jsonl else report))
        if completion.finish_reason == "interrupted":
            raise KeyboardInterrupt(f"after {count(len(completion.token_ids), 'token')}")
        report_speed(completion)


def _recorder() -> "Recorder":
    from isobit.verify.receipt import Recorder  # noqa: PLC0415 - 10 ms that most calls do not need

    return Recorder()


Write = Callable[[str, Stream, int], None]
"""Takes a piece of text, and the stream with the number of tokens that were there before it."""


def _nothing(_piece: str, _stream: Stream, _told: int) -> None:
    pass


def has_text(model: Model) -> bool:
    """Whether its tokens are text: it has a tokenizer."""
    try:
        return model.tokenizer is not None
    except ModelRefused:
        return False


class Ids:
    """Prints the ids of tokens that have no text, one a line."""

    def __call__(self, _piece: str, stream: Stream, printed: int) -> None:
        """A :data:`Write`."""
        for token in stream.token_ids[printed:]:
            print(token, flush=True)


class _Events:
    """Prints a JSON object for each token as it comes.

    A character may take several tokens, and a stop string may begin in one: the text of a token is
    what became certain with it, and may be empty.
    """

    def __init__(self, experts: "Recorder | None") -> None:
        self._experts = experts

    def __call__(self, piece: str, stream: Stream, printed: int) -> None:
        n = len(stream.token_ids)
        for i in range(printed, n):
            event = {"type": "token", "index": i, "id": stream.token_ids[i]}
            token = stream.tokens[i]
            event |= {"text": piece if i == n - 1 else "", "logprob": token.logprob}
            if token.top:
                event["top"] = token.top
            if self._experts is not None:
                event["experts"] = self._experts.experts_of(i)
            print(json.dumps(event), flush=True)
        if piece and printed == n:  # what was held back, at the end
            print(json.dumps({"type": "text", "text": piece}), flush=True)


def follow(
    model: Model, ids: list[int], settings: Settings, write: Write | None = None
) -> Completion:
    """Generate, and hand on or print what comes; after Ctrl-C the completion says "interrupted".

    Raises KeyboardInterrupt with how far the prompt was read if no token came of it.
    """
    read = [0]
    with busy("reading the prompt") as change:

        def progress(done: int, total: int) -> None:
            read[0] = done
            change(f"reading the prompt: {done:,} of {total:,} tokens")

        settings = {**settings, "progress": progress}
        stream = model.stream(ids, **settings)
        first = None
        try:
            first = next(stream, None)
        except KeyboardInterrupt:
            if not stream.token_ids:
                stop = f"after {read[0]:,} of {count(len(ids), 'prompt token')}"
                raise KeyboardInterrupt(stop) from None
    with stream:
        show(stream, first, write)
    assert stream.completion is not None
    return stream.completion


def show(stream: Stream, first: str | None, write: Write | None = None) -> None:
    """Print a generation from its first piece on, or hand it to ``write``."""
    terminal, printed = sys.stdout.isatty(), 0
    piece = first
    try:
        while piece is not None:
            if write is not None:
                with _whole():
                    write(piece, stream, printed)
                    printed = len(stream.token_ids)
            else:
                sys.stdout.write(shown_as_is(piece) if terminal else piece)
                sys.stdout.flush()
            piece = next(stream, None)
    except KeyboardInterrupt:
        pass  # the completion says so
    if write is not None and printed < len(stream.token_ids):
        write("", stream, printed)
    elif write is None and terminal:
        print()


@contextmanager
def _whole() -> Iterator[None]:
    """Let a first Ctrl-C wait for what is inside, so that no line is lost or comes twice."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    waiting: list[int] = []

    def wait(number: int, _: FrameType | None) -> None:
        if waiting:  # the reader of a pipe may never come
            raise KeyboardInterrupt
        waiting.append(number)

    signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if waiting:
        raise KeyboardInterrupt


def report_speed(completion: Completion) -> None:
    """Say on stderr how fast prefill and decode went."""
    t = completion.timings
    cached = f" ({t.cached_tokens:,} more were cached)" if t.cached_tokens else ""
    line = f"prefill {count(t.prefill_tokens, 'token')}{cached}"
    line += f", {t.prefill_rate:.1f} tokens/s" if t.prefill_rate else ""
    if t.decode_tokens:
        line += f"; decode {count(t.decode_tokens, 'token')}, {t.decode_rate:.1f} tokens/s"
    say(line + (f"; {completion.note}" if completion.note else ""))


def _report(
    model: Model, name: str, prompt_ids: list[int], completion: Completion
) -> dict[str, object]:
    t = completion.timings
    found = completion.logprobs
    logprobs = found and {
        "tokens": found.tokens.tolist(),
        "top_ids": found.top_ids.tolist(),
        "top": found.top.tolist(),
    }
    return {
        "model": name,
        "backend": model.backend.name,
        "device": model.backend.device,
        "activation_bits": model.engine.activation_bits,
        "activation_planes": model.engine.planes,  # its former name, for a release
        "prompt_token_ids": prompt_ids,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "note": completion.note,
        "seed": completion.seed,
        "logprobs": logprobs,
        "prefill_tokens": t.prefill_tokens,
        "cached_tokens": t.cached_tokens,
        "prefill_seconds": t.prefill_seconds,
        "prefill_tokens_per_second": t.prefill_rate,
        "decode_tokens": t.decode_tokens,
        "decode_seconds": t.decode_seconds,
        "decode_tokens_per_second": t.decode_rate,
    }
