"""The chat page in a browser: the system's chromium without a screen, driven by selenium."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
import threading
import time
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
ENTER, SHIFT, ESCAPE, TAB = "\ue007", "\ue008", "\ue00c", "\ue004"


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


class Page:
    """What a person sees and does."""

    def __init__(self, driver: Any, address: str, script: Scripted) -> None:
        self.driver = driver
        self.address = address
        self.script = script

    def open(self) -> None:
        self.driver.get(self.address)
        self.until(lambda: self.js("return document.readyState === 'complete'"))

    def js(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(code, *arguments)

    def until(self, condition: Callable[[], Any], seconds: float = 60) -> Any:
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, self.text("body")
            time.sleep(0.02)
        return found

    def find(self, css: str) -> Any:
        return self.driver.find_element("css selector", css)

    def text(self, css: str) -> str:
        return str(self.js("return document.querySelector(arguments[0])?.innerText ?? ''", css))

    def button(self, text: str) -> Any:
        """The last visible button of this text."""
        every = self.driver.find_elements("css selector", "button")
        return [each for each in every if each.is_displayed() and each.text == text][-1]

    def type(self, *keys: str) -> None:
        self.js("return document.activeElement").send_keys(*keys)

    def ask(self, text: str, *, wait: bool = True) -> None:
        self.find("#question").send_keys(text, ENTER)
        if wait:
            self.complete()

    def complete(self) -> None:
        self.until(lambda: self.find("#send").is_displayed())

    def kept(self) -> list[dict[str, Any]]:
        """The conversation of this tab, as it is stored."""
        return json.loads(self.js("return sessionStorage.getItem('isobit.conversation')") or "[]")

    def begin_with(self, kept: list[dict[str, Any]]) -> None:
        """The page as it is opened in a tab that has kept this."""
        self.driver.get(f"{self.address}page/icon.svg")  # of its origin, without its code
        code = "sessionStorage.setItem('isobit.conversation', arguments[0])"
        self.js(code, json.dumps(kept))
        self.open()

    def set(self, **settings: object) -> None:
        for name, value in settings.items():
            code = "document.querySelector(`[name=${arguments[0]}]`).value = arguments[1]"
            self.js(code, name, str(value))


def _event(choice: dict[str, Any]) -> str:
    return f"data: {json.dumps({'choices': [{'index': 0, 'finish_reason': None} | choice]})}\n\n"
