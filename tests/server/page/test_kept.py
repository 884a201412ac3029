"""The chat page in a browser: what was said, and the bits of it, outlive what may happen."""

import json
from typing import Any

import httpx
import openai
import pytest

from isobit.runtime.model import Model
from tests.server.browser import ENTER, Page
from tests.server.conftest import Gate
from tests.server.test_server import url

HEAR = """
    const plain = window.fetch;
    window.sent = [];
    window.fetch = (path, options) => (sent.push([path, options?.body]), plain(path, options));
"""


def test_all_bits_of_seeds_and_receipts_are_kept(page: Page, client: openai.OpenAI) -> None:
    seed = 2**64 - 1
    page.find("#open-settings").click()
    page.find("[name=seed]").send_keys(str(seed))
    page.button("Done").click()
    page.set(max_tokens=3, temperature=1)
    page.js(HEAR)
    page.ask('a "quoted" {brace')
    asked = json.loads(page.js("return sent[0][1]"))
    assert asked["seed"] == seed
    given = httpx.post(url(client, "/v1/chat/completions"), json=asked | {"stream": False}).text
    receipt = page.kept()[-1]["receipt"]
    assert f'"isobit_receipt":{receipt}}}' in given
    assert f'"seed":{seed}' in receipt
    page.driver.refresh()
    page.js(HEAR)
    page.button("Replay on the CPU").click()
    page.until(lambda: page.text(".verdict").startswith("Identical: 3 tokens"))
    assert page.js("return sent.at(-1)") == ["replay", f'{{"isobit_receipt":{receipt}}}']


def test_a_stopped_answer_can_be_replayed(
    page: Page, served_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(served_model, monkeypatch, 9)
    page.ask("import os", wait=False)
    page.until(lambda: page.text(".live > .text"))
    page.js(HEAR)
    page.button("Stop").click()
    page.until(lambda: page.js("return sent.length"))
    gate.opened.set()
    page.complete()
    assert page.text(".answer .quiet") == "Stopped."
    receipt = json.loads(page.kept()[-1]["receipt"])
    n = len(receipt["tokens"])
    assert page.text(".stats").startswith(f"{n} token")
    assert (
        served_model.detokenize([t["token"] for t in receipt["tokens"]]) == page.kept()[-1]["text"]
    )
    page.button("Replay on the CPU").click()
    page.until(lambda: page.text(".verdict").startswith(f"Identical: {n} token"))


def test_a_reload_loses_nothing(page: Page) -> None:
    left = page.script.goes_on("word ")
    page.ask("Count", wait=False)
    page.until(lambda: page.text(".live > .text"))
    page.find("#question").send_keys("A draft")
    page.driver.refresh()
    page.until(left.is_set)
    assert page.text(".answer > .text").startswith("word")
    assert page.text(".answer .quiet") == "Incomplete."
    assert page.find("#question").get_attribute("value") == "A draft"
    page.script.says("All of it.")
    page.button("Regenerate").click()
    page.until(lambda: page.text(".answer > .text") == "All of it.")
    page.begin_with(page.kept()[:1])  # not even the beginning of an answer came
    assert "no answer to this yet" in page.text("[role=alert]")
    page.script.says("Now.")
    page.button("Try again").click()
    page.until(lambda: page.text(".answer > .text") == "Now.")


def test_an_old_answer_stands_until_a_new_one_begins(page: Page) -> None:
    page.script.says("Old.")
    page.ask("First")
    old = page.kept()
    for begin in (lambda: page.button("Regenerate").click(), lambda: edit(page, " thing")):
        page.script.refuses(500, "broken")
        begin()
        page.until(lambda: page.text("[role=alert]"))
        assert page.text(".answer > .text") == "Old."
        assert page.kept() == old
    page.script.says("New.")
    page.button("Try again").click()
    page.until(lambda: page.text(".answer > .text") == "New.")
    assert page.script.bodies[-1]["messages"] == [{"role": "user", "content": "First thing"}]
    assert [m["text"] for m in page.kept()] == ["First thing", "New."]


def edit(page: Page, more: str) -> None:
    page.find(".question button").click()
    page.type(more, ENTER)


def test_a_tab_leaves_the_conversations_of_others_alone(page: Page) -> None:
    page.script.says("Mine.")
    page.ask("First")
    first, left = page.driver.current_window_handle, "return localStorage['isobit.conversation']"
    page.driver.switch_to.new_window("tab")
    try:
        page.open()
        assert page.text(".answer > .text") == "Mine."  # as after closing the browser
        page.button("New chat").click()
        assert page.kept() == []
        page.button("Back to the last chat").click()
        assert page.text(".answer > .text") == "Mine."
        page.button("New chat").click()
        page.script.says("Yours.")
        page.ask("Second")
        page.button("New chat").click()
        page.js("localStorage['isobit.conversation'] = 'of a tab that was closed'")
        page.driver.get(page.address + "page/icon.svg")
        assert page.js(left) == "of a tab that was closed"
        page.js("localStorage.removeItem('isobit.conversation')")
        page.driver.close()
    finally:
        page.driver.switch_to.window(first)
    for _ in range(2):
        assert page.text(".answer > .text") == "Mine."
        page.driver.refresh()
    page.script.says("Still mine.")
    page.ask("Third")
    said: list[Any] = page.script.bodies[-1]["messages"]
    assert [m["content"] for m in said] == ["First", "Mine.", "Third"]
