"""``isobit front``: one address for several servers; streams outlive any one of them."""

import argparse
import asyncio
import secrets
import signal
from collections.abc import Sequence

from isobit.cli import event_loop, options, say
from isobit.cli.output import count
from isobit.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "urls", nargs="+", metavar="URL", help="where servers are: http://10.0.0.1:8000"
    )
    group = parser.add_argument_group("front")
    options.add_server(group)
    options.add_front_key(group)


def main(args: argparse.Namespace) -> None:
    """Run the command."""
    for url in args.urls:
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"URL: expected one with http:// or https://, got {url!r:.80}")
    api_key = options.secret(args.api_key_env) if args.api_key_env else None
    _run(args, args.urls, options.secret(args.front_key_env), api_key)


def serve_replicas(args: argparse.Namespace, api_key: str | None) -> None:
    """``isobit serve --replicas``: processes of this machine, and a front before them."""
    argv = [*args.argv, "--front-key-env", "ISOBIT_FRONT_KEY"]
    _run(args, (), secrets.token_hex(32), api_key, argv, args.replicas)


def _run(
    args: argparse.Namespace,
    urls: Sequence[str],
    key: str,
    api_key: str | None,
    argv: Sequence[str] = (),
    n: int = 0,
) -> None:
    try:
        from isobit.server.front.front import Front  # noqa: PLC0415  # an extra
        from isobit.server.front.processes import Processes  # noqa: PLC0415
        from isobit.server.front.replicas import Replicas  # noqa: PLC0415
        from isobit.server.guard import FRONT  # noqa: PLC0415
        from isobit.server.serving import prepared  # noqa: PLC0415
        from isobit.server.sockets import UNGUARDED, address, bound, listen, unguarded  # noqa: PLC0415
    except ImportError as error:
        raise UsageError(f"{error.name}: not installed: pip install '.[serve]'") from None
    headers = {FRONT: key} | ({"authorization": f"Bearer {api_key}"} if api_key else {})

    sockets = bound(args.host, args.port)

    async def serve() -> None:
        processes = Processes(argv, n, args.grace, key, say) if n else None
        replicas = Replicas(processes.urls if processes else urls, say, headers)
        try:
            async with replicas:
                if processes is not None:
                    await processes.start(replicas)
                    rolling = set[asyncio.Task[None]]()

                    def roll() -> None:
                        rolling.add(asyncio.create_task(processes.roll()))

                    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, roll)
                front = Front(replicas, key, api_key, args.origin)
                server = prepared(front, front.app(), args.grace, say)
                listen(sockets)
                at = address(args.host, sockets)
                say(f"{count(len(replicas.all), 'replica')}: {at}/v1")
                if unguarded(sockets, api_key):
                    say(UNGUARDED)
                if n and not args.no_page:
                    say(f"a page to talk with it: {at}/")
                await server.serve(sockets)
        finally:
            if processes is not None:
                await processes.stop()

    event_loop.run(serve())
