"""``isobit pull``: bring a model from the Hugging Face hub into its cache; its path on stdout."""

import argparse

from isobit.cli import say
from isobit.hub.download import pull
from isobit.hub.names import HubName


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="hf://ORG/REPO[@REVISION], with :QUANT or /FILE.gguf to choose (default: Q4_K_M)",
    )


def main(args: argparse.Namespace) -> None:
    """Run the command."""
    print(pull(HubName.parse(args.model), say))
