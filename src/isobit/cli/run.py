"""``isobit run``: continue a prompt, the text on stdout as it comes, the speed on stderr."""

import argparse
import json
import sys

from isobit.cli import options, say
from isobit.runtime.generation import Completion, Stream
from isobit.runtime.model import Model
from isobit.verify.receipt import Recorder

# Control characters of a text, made visible: on a terminal they are commands.
_VISIBLE = {c: repr(chr(c))[1:-1] for c in (*range(32), *range(127, 160)) if chr(c) not in "\t\n"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    options.add_model(parser)
    options.add_prompt(parser, "-p", "--prompt", required=True)
    add_length(parser, 128)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object when done, instead of the text"
    )
    parser.add_argument(
        "--receipt",
        type=options.output_file,
        metavar="FILE",
        help="write what isobit replay needs to compute this again",
    )
    parser.add_argument(
        "--routes",
        type=options.output_file,
        metavar="FILE",
        help="write each token's experts (safetensors)",
    )
    parser.add_argument(
        "--logprobs",
        type=options.at_least(0),
        metavar="K",
        help="with --json: log-probabilities of each token and of the K most likely",
    )
    options.add_sampling(parser)
    options.add_engine(parser)
    options.add_inexact(parser)
    options.add_context(parser)


def add_length(parser: argparse.ArgumentParser, default: int) -> None:
    """The most tokens to generate."""
    parser.add_argument(
        "-n",
        "--max-tokens",
        type=options.at_least(0),
        default=default,
        metavar="N",
        help="most tokens to generate (default: %(default)s)",
    )


def main(args: argparse.Namespace) -> None:
    """Run the command."""
    prompt = options.read_prompt(args)
    assert prompt is not None
    settings = options.settings(args)
    with options.open_model(args, args.context) as model:
        ids = model.tokenize(prompt) if isinstance(prompt, str) else prompt
        watch = Recorder() if args.receipt or args.routes else None
        settings["watch"] = watch
        settings["logprobs"] = args.logprobs
        with model.stream(ids, **settings) as stream:
            completion = follow(stream, quiet=args.json)
        if watch is not None and args.receipt:
            watch.receipt().save(args.receipt)
        if watch is not None and args.routes:
            watch.save_routes(args.routes)
        if args.json:
            print(json.dumps(_report(model, args.model, ids, completion)))
        report_speed(completion)


def follow(stream: Stream, *, quiet: bool = False) -> Completion:
    """Print a generation as it comes; on Ctrl-C, say how far it got."""
    terminal = sys.stdout.isatty()
    try:
        for piece in stream:
            if not quiet:
                sys.stdout.write(piece.translate(_VISIBLE) if terminal else piece)
                sys.stdout.flush()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"after {len(stream.token_ids)} tokens") from None
    finally:
        if terminal and not quiet:
            print()
    assert stream.completion is not None
    return stream.completion


def report_speed(completion: Completion) -> None:
    """Say on stderr how fast prefill and decode went."""
    t = completion.timings
    line = f"prefill {t.prefill_tokens} tokens, {t.prefill_rate:.1f} tokens/s; "
    line += f"decode {t.decode_tokens} tokens, {t.decode_rate:.1f} tokens/s"
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
        "activation_planes": model.engine.activation_planes,
        "prompt_token_ids": prompt_ids,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "note": completion.note,
        "seed": completion.seed,
        "logprobs": logprobs,
        "prefill_tokens": t.prefill_tokens,
        "prefill_seconds": t.prefill_seconds,
        "prefill_tokens_per_second": t.prefill_rate,
        "decode_tokens": t.decode_tokens,
        "decode_seconds": t.decode_seconds,
        "decode_tokens_per_second": t.decode_rate,
    }
