"""``isobit tokenize``: a text as the model's token ids, or ids as text."""

import argparse
import json

from isobit.cli import options, prompt_options, tools
from isobit.cli.output import visible
from isobit.errors import UsageError
from isobit.text.tokenizer import Tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = (
        "Print a text's token ids in the model's vocabulary, as --tokens takes them; or, given "
        "--tokens, their text."
    )
    options.add_model(parser)
    prompt_options.add_prompt(parser, "-p", "--prompt", required=True, text="the text")
    parser.add_argument(
        "--plain",
        action="store_true",
        help="special tokens that are written in the text are text, as in a chat's message",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--pieces", action="store_true", help="a line for each token: id, text")
    form.add_argument("--json", action="store_true", help="print one JSON object instead")


def main(args: argparse.Namespace) -> None:
    """Run the command."""
    given = prompt_options.read_prompt(args)
    assert given is not None
    with tools.open_file(args.model) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata, str(file.path))
        n = len(tokenizer.vocabulary.tokens)
        if isinstance(given, str):
            ids = tokenizer.encode(given, special=not args.plain)
        else:
            ids = given
            if wrong := [i for i in ids if not 0 <= i < n]:
                raise UsageError(f"token id: expected 0 to {n - 1}, got {wrong[0]}")
        pieces = [tokenizer.decode([i]) for i in ids]
        text = given if isinstance(given, str) else tokenizer.decode(ids)
    if args.json:
        print(json.dumps({"token_ids": ids, "pieces": pieces, "text": text}))
    elif args.pieces:
        for i, piece in zip(ids, pieces, strict=True):
            print(f"{i:>8}  {visible(repr(piece), 200)}")
    elif isinstance(given, str):
        print(",".join(map(str, ids)))
    else:
        print(text)
