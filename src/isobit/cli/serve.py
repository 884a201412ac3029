"""``isobit serve``: a model behind OpenAI's interface."""

import argparse
import os

from isobit.cli import options, say
from isobit.cli.output import bar
from isobit.errors import UsageError
from isobit.runtime.scheduler import Limits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    options.add_model(parser)
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="(default: %(default)s)")
    group.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    group.add_argument("--name", help="what clients call the model (default: the file's name)")
    group.add_argument(
        "--api-key-env",
        metavar="VARIABLE",
        help="the environment variable that holds the key that clients must give",
    )
    group.add_argument("--no-page", action="store_true", help="serve no page to chat at /")
    group.add_argument(
        "--origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let in scripts of pages from there, https://chat.example or '*'; may be repeated",
    )
    group.add_argument(
        "--waiting",
        type=options.at_least(1),
        default=Limits.waiting,
        metavar="N",
        help="most requests that wait; more are told to come again (default: %(default)s)",
    )
    group.add_argument(
        "--grace",
        type=options.at_least(0),
        default=10,
        metavar="SECONDS",
        help="what runs may go on for so long after SIGTERM (default: %(default)s)",
    )
    options.add_context(parser)
    options.add_engine(parser, sequences=4)
    options.add_inexact(parser)


def main(args: argparse.Namespace) -> None:
    """Run the command."""
    try:
        from isobit.server.service import Service  # noqa: PLC0415
        from isobit.server.serving import run  # noqa: PLC0415  # an extra
    except ImportError as error:
        raise UsageError(f"{error.name}: not installed: pip install 'isobit[serve]'") from None
    key = None
    if args.api_key_env is not None:
        key = os.environ.get(args.api_key_env)
        if not key:
            raise UsageError(f"{args.api_key_env}: expected a key in it, got nothing")
    with options.open_model(args, args.context) as model:
        with bar("sha256", "bytes") as step:
            model.file.sha256(step)  # is in every answer; read once in a file's life
        limits = Limits(pass_tokens=max(model.engine.chunk, Limits.running), waiting=args.waiting)
        page = not args.no_page
        with Service(
            model, name=args.name, api_key=key, limits=limits, page=page, origins=args.origin
        ) as service:
            device = f"{model.backend.name} ({model.backend.device})"
            say(f"{service.name} on {device}: http://{args.host}:{args.port}/v1")
            if page:
                say(f"a page to talk with it: http://{args.host}:{args.port}/")
            run(service, args.host, args.port, args.grace)
