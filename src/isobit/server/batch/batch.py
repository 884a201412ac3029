"""Batches: requests in a file, answers in another, through the application without a socket.

The formats are those of OpenAI's batch interface: a line of the input is ``{"custom_id": …,
"method": "POST", "url": "/v1/chat/completions", "body": {…}}``, a line of the output
``{"id": …, "custom_id": …, "response": {"status_code": …, "request_id": …, "body": {…}}, "error":
null, "isobit_request": …}``, in the order in which rows are finished. A row is written once, whole;
what was written stays finished, whoever is killed meanwhile.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any

from starlette.types import ASGIApp

from isobit.config import EngineConfig
from isobit.errors import BackendUnavailable, FileRefused, UsageError, no_such_file
from isobit.files import regular
from isobit.runtime.scheduler import Limits
from isobit.server.batch.in_process import messages
from isobit.server.request.fields import MOST_CHOICES

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")
WITH_RECEIPTS = URLS[:3]
_REQUEST = "isobit_request"
"""Of an answer: the digest of its request, so that a changed one is not taken for answered."""
_LINE = 16 << 20  # bytes of a row
Ask = Callable[[str, Any], Awaitable[tuple[int, Any]]]
"""Gives the status and the body of an answer to a body that is sent to a URL."""
_AGAIN = 0.2  # seconds until a request is tried again that others stood in the way of


@dataclass(frozen=True)
class Row:
    """A row of the input: where it lies in the file."""

    custom_id: str
    request: str
    """A digest of what it asks for."""
    offset: int
    length: int


class Answered:
    """The file of answers, open for more; one process at a time.

    Raises UsageError if it cannot be written or another process writes it, FileRefused if it is not
    a file of answers.
    """

    def __init__(self, path: Path, fingerprint: str, rows: Sequence[Row]) -> None:
        """``rows``: all that are asked for."""
        self.path = path
        self._requests = {row.custom_id: row.request for row in rows}
        self.done: dict[str, int] = {}
        """By custom_id: the status of each row that is finished."""
        try:
            self._file: IO[bytes] = path.open("ab+")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{path}: another process writes answers there") from None
        except OSError as error:
            raise UsageError(f"{path}: cannot write answers there: {error.strerror}") from None
        self._read(fingerprint)

    def _read(self, fingerprint: str) -> None:
        """What is finished. A last line that is not whole is what a kill left: it goes."""
        self._file.seek(0)
        good = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
                body, name, request = row["response"]["body"], row["custom_id"], row[_REQUEST]
                self.done[name] = row["response"]["status_code"]
                made_by = body.get("system_fingerprint", fingerprint)
                asked = self._requests.get(name, request)
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                raise FileRefused(
                    f"{self.path}, line {number}: expected an answer of a batch; name another file"
                ) from None
            if made_by != fingerprint:
                raise UsageError(
                    f"{self.path}, line {number}: expected answers of {fingerprint}, got one of "
                    f"{made_by!r:.80}: another model or setting; name another file"
                )
            if asked != request:
                raise UsageError(
                    f"{self.path}, line {number}: expected the answer to custom_id {name!r:.60} as "
                    "it is asked now, got that to another request; name another file, or the "
                    "request otherwise"
                )
            good += len(line)
        self._file.truncate(good)

    def write(self, custom_id: str, status: int, body: Any) -> None:
        """A row's answer."""
        name = hashlib.sha256(custom_id.encode("utf-8", "surrogatepass")).hexdigest()[:24]
        response = {"status_code": status, "request_id": f"req_{name}", "body": body}
        row: dict[str, Any] = {"id": f"batch_req_{name}", "custom_id": custom_id}
        row |= {"response": response, "error": None, _REQUEST: self._requests[custom_id]}
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()
        self.done[custom_id] = status

    def rows(self) -> Iterator[dict[str, Any]]:
        """All answers, again from the file."""
        with self.path.open("rb") as file:
            for line in file:
                yield json.loads(line)

    def close(self) -> None:
        """Let others write."""
        self._file.close()


def read_rows(path: Path) -> list[Row]:
    """The rows of an input file, each checked; raises FileRefused naming the line."""
    rows: dict[str, Row] = {}
    offset = 0
    try:
        with regular(path, "requests, one a line").open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(_LINE + 1), b""), 1):
                if line.strip():
                    custom_id, request = _checked(line, f"{path}, line {number}")
                    if custom_id in rows:
                        raise FileRefused(
                            f"{path}, line {number}: custom_id {custom_id!r:.60}: expected one "
                            "that no row before it has"
                        )
                    rows[custom_id] = Row(custom_id, request, offset, len(line))
                offset += len(line)
    except FileNotFoundError:
        raise UsageError(no_such_file(str(path))) from None
    except OSError as error:
        raise UsageError(f"{path}: expected a readable file, got: {error.strerror}") from None
    if not rows:
        raise FileRefused(f"{path}: expected requests, one a line; got none")
    return list(rows.values())


def _checked(line: bytes, where: str) -> tuple[str, str]:
    """The name of a row, and the digest of its request."""
    if len(line) > _LINE:
        raise FileRefused(f"{where}: expected a row of at most {_LINE >> 20} MiB, got more")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FileRefused(f"{where}: expected JSON, got: {error}") from None
    row = row if isinstance(row, dict) else {}
    custom_id, body = row.get("custom_id"), row.get("body")
    for key, good, expected in (
        ("custom_id", isinstance(custom_id, str) and bool(custom_id), "a name"),
        ("method", row.get("method", "POST") == "POST", '"POST"'),
        ("url", row.get("url") in URLS, f"one of {', '.join(URLS)}"),
        ("body", isinstance(body, dict), "an object, the request"),
    ):
        if not good:
            raise FileRefused(f"{where}: {key}: expected {expected}, got {row.get(key)!r:.60}")
    assert isinstance(body, dict)
    if body.get("stream"):
        raise FileRefused(f"{where}: body.stream: expected false; a row is written once, whole")
    request = json.dumps([row["url"], body], sort_keys=True).encode()
    return str(custom_id), hashlib.sha256(request).hexdigest()


def limits_of(engine: EngineConfig, at_once: int) -> Limits:
    """Those of a model that answers so many rows at once: all of their choices may wait."""
    return Limits.of(engine, at_once * MOST_CHOICES)


async def run(
    ask: Ask,
    path: Path,
    rows: Sequence[Row],
    answered: Answered,
    *,
    at_once: int,
    receipts: bool,
    step: Callable[[], None],
) -> None:
    """Ask for every row that is not finished, so many at once, and write each answer.

    Raises BackendUnavailable if a row has no answer.
    """
    left = iter([row for row in rows if row.custom_id not in answered.done])
    with path.open("rb") as file:

        async def work() -> None:
            for row in left:
                file.seek(row.offset)
                asked = json.loads(file.read(row.length))
                body = asked["body"]
                if receipts and asked["url"] in WITH_RECEIPTS:
                    body["isobit_receipt"] = True
                status, answer = await ask(asked["url"], body)
                while status == HTTPStatus.TOO_MANY_REQUESTS:
                    await asyncio.sleep(_AGAIN)
                    status, answer = await ask(asked["url"], body)
                if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                    raise BackendUnavailable(
                        f"{path}: {row.custom_id}: {_message(answer)}; what is finished is kept: "
                        "start it again to go on"
                    )
                answered.write(row.custom_id, status, answer)
                step()

        await together(work, at_once)


async def together(work: Callable[[], Coroutine[Any, Any, None]], n: int) -> None:
    """So many of it at the same time; the first that fails ends the others."""
    tasks = [asyncio.create_task(work()) for _ in range(n)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def post(app: ASGIApp, url: str, body: Any) -> tuple[int, Any]:
    """A request to an application in this process: its status and its answer."""
    content = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
    status, parts = 500, list[bytes]()
    async for message in messages(app, "POST", url.encode(), headers, content):
        status = message.get("status", status)
        parts.append(message.get("body", b""))
    return status, json.loads(b"".join(parts))


def _message(answer: Any) -> str:
    error = answer.get("error") if isinstance(answer, dict) else None
    return str(error.get("message") if isinstance(error, dict) else answer)[:200]


def chosen(custom_id: str, share: float) -> bool:
    """Whether a row is one of those computed again: by its name, so that it stays one."""
    digest = hashlib.sha256(b"audit " + custom_id.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
