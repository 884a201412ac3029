"""``POST /replay``: a receipt computed again on the CPU, in a process of its own.

A process can be ended at any moment, gives all of its memory back, and has a low priority, so that
the engine goes on as if it were not there.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from isobit.config import EngineConfig
from isobit.errors import IsobitError, UsageError
from isobit.runtime.model import Model
from isobit.runtime.scheduler import QueueFull
from isobit.server.body import read, unless_gone
from isobit.server.request.prompts import RequestBody
from isobit.server.service import Service
from isobit.verify.receipt import Receipt, replay

MOST_WAITING = 8
MOST_SECONDS = 600


class ReplayRequest(RequestBody):
    """What may be asked."""

    isobit_receipt: dict[str, Any]
    """As an answer carries it."""


class Replay:
    """The handler. One receipt at a time is computed; others wait for it."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._inside = 0
        self._turn = asyncio.Semaphore()

    def routes(self) -> list[Route]:
        """Where it is."""
        return [Route("/replay", self.replay, methods=["POST"])]

    async def replay(self, request: Request) -> Response:
        """``POST /replay``: whether a receipt comes out the same on the CPU."""
        asked = await read(request, ReplayRequest)
        model = self._service.model
        receipt = await asyncio.to_thread(_checked, asked.isobit_receipt, model.context)
        if self._inside > MOST_WAITING:
            raise QueueFull(f"replays: expected at most {MOST_WAITING} that wait: try again later")
        self._inside += 1
        try:
            verdict = await unless_gone(request, self._in_turn(receipt, model))
        finally:
            self._inside -= 1
        if "refused" in verdict:
            raise UsageError(f"isobit_receipt: {verdict['refused']}")
        return JSONResponse(verdict)

    async def _in_turn(self, receipt: bytes, model: Model) -> Any:
        async with self._turn:
            return await _computed(receipt, model, _environment(self._service))


def _checked(found: dict[str, Any], context: int) -> bytes:
    """The receipt as JSON. Raises UsageError for what is none, or is too long to be the model's."""
    try:
        receipt = Receipt.of(found, "isobit_receipt")
    except IsobitError as error:
        raise UsageError(str(error)) from None
    n = len(receipt.prompt) + len(receipt.tokens)
    if n > context:
        raise UsageError(
            f"isobit_receipt: expected at most {context} tokens (the context), got {n}"
        )
    return json.dumps(found).encode()


def _environment(service: Service) -> dict[str, str]:
    """This process's, without the keys that are in it."""
    keys = (service.api_key, service.front_key)
    return {name: value for name, value in os.environ.items() if value not in keys}


async def _computed(receipt: bytes, model: Model, environment: dict[str, str]) -> Any:
    """The verdict of a process. Cancelled, it ends the process."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "isobit.server.replay", str(model.located)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=environment,
    )
    try:
        async with asyncio.timeout(MOST_SECONDS):
            said, _ = await process.communicate(receipt)
    except TimeoutError:
        raise IsobitError(f"replay: expected within {MOST_SECONDS} s, it took longer") from None
    except RuntimeError:  # uvloop's: it ended before it had read
        said = b""
        await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise IsobitError(f"replay: its process ended with {process.returncode}")
    return json.loads(said)


def verdict_of(found: Any, path: Path, threads: int | None = None) -> dict[str, Any]:
    """The verdict on a receipt, computed on the CPU; ``refused``: why there is none."""
    receipt = Receipt.of(found, "receipt")
    n = len(receipt.prompt) + len(receipt.tokens)
    engine = EngineConfig(
        activation_bits=receipt.activation_bits, context=n, max_sequences=1, threads=threads
    )
    with Model(path, "cpu", engine) as model:
        try:
            difference = replay(receipt, model)
        except IsobitError as error:
            return {"refused": str(error)}
        where = f"{model.backend.name} ({model.backend.device})"
    n = len(receipt.tokens)
    if difference is None:
        words = f"Identical: {n} {'token' if n == 1 else 'tokens'}, bit for bit, on {where}."
    else:
        words = f"Different: on {where} first at {difference}."
    return {
        "identical": difference is None,
        "tokens": n,
        "difference": difference and asdict(difference),
        "backend": "cpu",
        "message": words,
    }


def main() -> None:
    """Read a receipt, write the verdict: what the process does."""
    os.nice(10)
    signal.alarm(MOST_SECONDS)  # its parent may be gone by then
    threads = max((os.cpu_count() or 1) // 2, 1)
    try:
        verdict = verdict_of(json.load(sys.stdin), Path(sys.argv[1]), threads)
    except IsobitError as error:  # the file is gone, or another
        sys.exit(f"replay: {error}")
    print(json.dumps(verdict))


if __name__ == "__main__":
    main()
