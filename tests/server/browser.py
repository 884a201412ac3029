"""The chat page in a browser: the system's chromium without a screen, driven by selenium."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.helpers.expected import needs, not_run

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


@contextmanager
def chromium() -> Iterator[Any]:
    """A driver of a fresh browser; what needs one is not run where there is none."""
    needs("chromium", "selenium")
    from selenium import webdriver  # noqa: PLC0415 - an extra

    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        not_run("chromium", "no chromium and chromedriver (apt install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for flag in (*FLAGS, f"--user-data-dir={folder}"):
            options.add_argument(flag)
        service = webdriver.ChromeService(executable_path=driver)
        opened = webdriver.Chrome(options=options, service=service)
        try:
            yield opened
        finally:
            opened.quit()


class Scripted:
    """Before the application: answers a chat as the next script says, and passes all else on."""

    def __init__(self) -> None:
        self.scripts: list[Callable[[Request], Response]] = []
        self.bodies: list[Any] = []
        """What was asked of the scripts."""
        self.cut = threading.Event()

    def __call__(self, app: ASGIApp) -> ASGIApp:
        async def scripted(scope: Scope, receive: Receive, send: Send) -> None:
            if scope.get("path") != "/v1/chat/completions" or not self.scripts:
                await app(scope, receive, send)
                return
            request = Request(scope, receive)
            self.bodies.append(await request.json())
            await self.scripts.pop(0)(request)(scope, receive, send)

        return scripted

    def says(self, *texts: str, thinks: str = "", finish: str | None = "stop") -> None:
        """The next answer, in these pieces; finish: None cuts the connection in its place,
        once ``cut`` is set."""
        self.cut.clear()

        async def pieces() -> Any:
            if thinks:
                yield _event({"delta": {"role": "assistant", "reasoning_content": thinks}})
            for text in texts:
                yield _event({"delta": {"content": text}})
            if finish is None:
                while not self.cut.is_set():
                    await asyncio.sleep(0.01)
                raise ConnectionError
            yield _event({"delta": {}, "finish_reason": finish})
            yield 'data: {"choices": [], "usage": {"completion_tokens": 7}}\n\n'
            yield "data: [DONE]\n\n"

        self.scripts.append(lambda _: StreamingResponse(pieces(), media_type="text/event-stream"))

    def goes_on(self, text: str) -> threading.Event:
        """The next answer goes on for minutes. It is set when the client has left."""
        left = threading.Event()

        async def pieces() -> Any:
            try:
                for _ in range(12000):
                    yield _event({"delta": {"content": text}})
                    await asyncio.sleep(0.01)
            except BaseException:
                left.set()
                raise

        self.scripts.append(lambda _: StreamingResponse(pieces(), media_type="text/event-stream"))
        return left

    def refuses(self, status: int, message: str, code: str = "", **headers: str) -> None:
        """The next answer is an error."""
        body = json.dumps({"error": {"message": message, "code": code}})
        self.scripts.append(lambda _: Response(body, status, headers))


def _event(choice: dict[str, Any]) -> str:
    return f"data: {json.dumps({'choices': [{'index': 0, 'finish_reason': None} | choice]})}\n\n"
