"""``isobit models``: what the hub's cache and Ollama keep on this machine; what to remove."""

import argparse
import json

from isobit.cli import say
from isobit.cli.output import markdown, size, visible
from isobit.hub import cache, ollama
from isobit.hub.names import HubName


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--remove",
        metavar="MODEL",
        help="remove hf://ORG/REPO:QUANT from the cache, without :QUANT all models of it",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON array")


def main(args: argparse.Namespace) -> None:
    """Run the command."""
    if args.remove is not None:
        for gone in cache.remove(HubName.parse(args.remove)):
            say(f"removed {gone.name} ({size(gone.nbytes)})")
        return
    found = [(str(m.name), m.nbytes, str(m.paths[0])) for m in cache.models()]
    for name, blob in ollama.models().items():
        if blob.is_file():
            found.append((name, blob.stat().st_size, str(blob)))
    if args.json:
        keys = ("name", "bytes", "path")
        print(json.dumps([dict(zip(keys, row, strict=True)) for row in found]))
    elif found:
        print(markdown(["model", "size"], [[visible(n, 200), size(b)] for n, b, _ in found]))
    else:
        say("no models yet; isobit pull hf://ORG/REPO brings one")
