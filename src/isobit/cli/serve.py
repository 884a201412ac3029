"""``isobit serve``: a model behind OpenAI's interface."""

import argparse
import os
import signal
import socket
import threading
import time

from isobit.backend_names import OWN_GPU
from isobit.cli import argtypes, front, options, say
from isobit.cli.output import bar
from isobit.config import EngineConfig
from isobit.errors import UsageError
from isobit.numerics import KV_PAGE
from isobit.runtime.model import Model
from isobit.runtime.scheduler import Limits

_PATIENCE = 2.0
"""Seconds between two lines about what takes long."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    options.add_model(parser)
    group = parser.add_argument_group("server")
    options.add_server(group)
    group.add_argument("--name", help="what clients call the model (default: the file's name)")
    group.add_argument("--no-page", action="store_true", help="serve no page to chat at /")
    group.add_argument(
        "--waiting",
        type=argtypes.at_least(1),
        default=Limits.waiting,
        metavar="N",
        help="most requests that wait; more are told to come again (default: %(default)s)",
    )
    group.add_argument(
        "--steady",
        action="store_true",
        help="let prompts hold the streams beside them up by no more than half a token's time, "
        "where that can be, however many wait: these wait longer, and a GPU does much less in all "
        "(for a long prompt that waits alone it is always so)",
    )
    options.add_front_key(group)
    group.add_argument(
        "--replicas",
        type=argtypes.at_least(1),
        metavar="N",
        help="so many processes that serve it, and a front before them: what one of them was "
        "answering when it died, another goes on with",
    )
    group.add_argument("--replica", type=int, help=argparse.SUPPRESS)  # a socket, of a front's
    options.add_context(parser)
    options.add_engine(parser, sequences=0)
    options.add_inexact(parser)


def main(args: argparse.Namespace) -> None:
    """Run the command."""
    try:
        from isobit.server.service import Service  # noqa: PLC0415
        from isobit.server.serving import run  # noqa: PLC0415  # an extra
        from isobit.server.sockets import UNGUARDED, address, bound, listen, unguarded  # noqa: PLC0415
    except ImportError as error:
        raise UsageError(f"{error.name}: not installed: pip install '.[serve]'") from None
    key = options.secret(args.api_key_env) if args.api_key_env else None
    fronted = args.replicas and args.replica is None
    if fronted and args.parts > 1 and args.backend in OWN_GPU:
        raise UsageError("--parts: expected 1 with --replicas on cuda: they would share GPUs")
    if (args.replicas or args.parts > 1 or args.hosts) and not args.sequences:
        args.sequences = EngineConfig.max_sequences  # they share the memory
        if args.replica is None:
            room = f"a KV cache of {args.sequences} contexts in each process"
            say(f"{room}, as they share the memory: --sequences gives more")
    if fronted:
        front.serve_replicas(args, key)
        return
    if args.replica is None:
        sockets = bound(args.host, args.port)
    else:
        sockets = [socket.socket(fileno=args.replica)]
        threading.Thread(target=_end_with_parent, daemon=True).start()
    with options.open_model(args, args.context) as model:
        with bar("sha256", "bytes") as step:
            model.file.sha256(step)  # is in every answer; read once in a file's life
        _prepare(model)
        limits = Limits.of(model.backend.engine, args.waiting, steady=args.steady)
        front_key = os.environ.get(args.front_key_env) or None
        page = not args.no_page
        with Service(
            model,
            name=args.name,
            api_key=key,
            front_key=front_key,
            limits=limits,
            page=page,
            origins=args.origin,
        ) as service:
            device = f"{model.backend.name} ({model.backend.device})"
            at = address(args.host, sockets)
            listen(sockets)
            tokens = model.backend.limits.pages * KV_PAGE
            room = f"{service.limits.running} answers at once, of up to {tokens:,} tokens together"
            if args.replica is None:
                say(f"{service.name} on {device}: {at}/v1")
                if unguarded(sockets, key):
                    say(UNGUARDED)
                say(room)
                if page:
                    say(f"a page to talk with it: {at}/")
            else:  # its front says where they answer
                say(f"a replica on {device}: {room}")
            run(service, sockets, args.grace, say)


def _prepare(model: Model) -> None:
    """Have the device ready before anybody can ask, with a line now and then if that takes long."""
    begun = told = time.monotonic()

    def step(done: int, total: int) -> None:
        nonlocal told
        if (now := time.monotonic()) > told + _PATIENCE:
            told = now
            say(f"kernels compiled: {done} of {total}")

    if made := model.backend.prepare(step):
        say(f"{made}, in {time.monotonic() - begun:.1f} s")


def _end_with_parent() -> None:
    """The front holds the other end of standard input while it lives."""
    while os.read(0, 1 << 12):
        pass
    while True:  # once might be while it is ignored
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
