"""The chat page, opened in a browser; it talks to the sample model, or to a script."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from isobit.runtime.model import Model
from isobit.server.service import Service
from tests.server.browser import Page, Scripted, chromium
from tests.server.conftest import serve
from tests.server.test_server import url


@pytest.fixture(scope="package")
def driver() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="package")
def script() -> Scripted:
    return Scripted()


@pytest.fixture(scope="package")
def served(served_model: Model, script: Scripted) -> Iterator[tuple[Service, openai.OpenAI]]:
    with serve(served_model, script, name="sample") as both:
        yield both


@pytest.fixture
def page(driver: Any, client: openai.OpenAI, script: Scripted) -> Iterator[Page]:
    found = Page(driver, url(client, "/"), script)
    script.scripts.clear()
    script.bodies.clear()
    driver.get(url(client, "/page/icon.svg"))  # of its origin, without its code
    driver.execute_script("localStorage.clear(); sessionStorage.clear()")
    driver.get_log("performance")
    driver.get_log("browser")
    found.open()
    yield found
    sent = [json.loads(each["message"])["message"] for each in driver.get_log("performance")]
    asked = [m["params"] for m in sent if m["method"] == "Network.requestWillBeSent"]
    assert asked
    own = (found.address, "blob:", "data:")
    others = [m["request"]["url"] for m in asked if not m["request"]["url"].startswith(own)]
    assert not others, "a request left the origin"
