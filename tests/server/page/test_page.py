"""The chat page in a browser, with the sample model or with answers that a test makes up."""

import json
from importlib import resources
from typing import Any

import openai
import pytest

from isobit.runtime.model import Model
from tests.helpers.expected import needs
from tests.server.browser import ENTER, ESCAPE, SHIFT, TAB, Page, Scripted
from tests.server.conftest import serve
from tests.server.test_server import url

HOSTILE = """<script>window.hacked = 1</script>

Inline <img src=x onerror="window.hacked = 1"> and <b onclick=x>bold</b>.

![picture](https://example.invalid/x.png) [link](javascript:window.hacked=1) [in](/metrics)

```html
<script>window.hacked = 1</script>
```

| <img src=x onerror=hacked()> |
|---|
| [ok](https://example.invalid/y) |

"""
REACH = """
    const box = (element) => element.getBoundingClientRect();
    const copy = box([...document.querySelectorAll(".code button")].at(-1));
    return box(document.querySelector("header")).bottom <= copy.top && copy.bottom < innerHeight;
"""
EDGES = """
    const light = (colour) => colour.match(/\\d+/g).slice(0, 3).map((c) => c / 255)
      .map((c) => (c > 0.04045 ? ((c + 0.055) / 1.055) ** 2.4 : c / 12.92))
      .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0.05);
    const paper = light(getComputedStyle(document.body).backgroundColor);
    return Math.min(...[...document.querySelectorAll("textarea, input, select")].map((field) => {
      const edge = light(getComputedStyle(field).borderTopColor);
      return Math.max(edge, paper) / Math.min(edge, paper);
    }));
"""
SPOKEN = "First one.\n\n- a\n- b\n\n```python\nx = 1\n```\n\nLast **one**."


def test_an_answer_is_the_interfaces_own(page: Page, client: openai.OpenAI) -> None:
    page.set(temperature=0.7, seed=11, max_tokens=40, system="Be brief.")
    question = "def fibonacci(n):\n"
    page.find("#question").send_keys("def fibonacci(n):", SHIFT + ENTER, "\ue000")
    assert page.find("#question").get_attribute("value") == question
    page.find("#question").send_keys(ENTER)
    page.complete()
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
    wanted = client.chat.completions.create(
        model="sample", messages=said, temperature=0.7, seed=11, max_tokens=40
    )
    asked, answer = page.kept()
    assert asked["text"] == question
    assert answer["text"] == wanted.choices[0].message.content
    assert page.text(".stats").startswith(f"{wanted.usage.completion_tokens} tokens · ")
    shown = page.text(".answer > .text")
    assert shown.split()[0] == answer["text"].split()[0]
    page.open()  # it is still there
    assert page.text(".answer > .text") == shown


def test_stop_leaves_the_answer(page: Page) -> None:
    for stop in (lambda: page.button("Stop").click(), lambda: page.type(ESCAPE)):
        left = page.script.goes_on("word ")
        page.ask("Count", wait=False)
        page.until(lambda: page.text(".live > .text"))
        assert not left.is_set()
        stop()
        page.complete()
        page.until(left.is_set)
        assert page.text(".answer .quiet") == "Stopped."
        assert page.kept()[-1]["text"]
        page.button("New chat").click()
        assert page.kept() == []


def test_what_follows_an_edited_message_is_dropped(page: Page) -> None:
    for text in ("one", "two", "three", "four"):
        page.script.says(f"Answer {text}.")
    page.ask("First")
    page.ask("Second")
    assert [m["content"] for m in page.script.bodies[-1]["messages"]] == [
        "First",
        "Answer one.",
        "Second",
    ]
    page.js("scrollTo(0, 0)")
    page.find(".question button").click()
    page.type(" thing", ESCAPE)  # given up
    assert page.text(".question .text") == "First"
    page.type(ENTER)  # the focus is on Edit again
    page.type(" thing", ENTER)
    page.complete()
    assert page.script.bodies[-1]["messages"] == [{"role": "user", "content": "First thing"}]
    assert [m["text"] for m in page.kept()] == ["First thing", "Answer three."]
    page.button("Regenerate").click()
    page.until(lambda: len(page.script.bodies) == 4)
    page.complete()
    assert page.script.bodies[-1]["messages"] == [{"role": "user", "content": "First thing"}]
    assert page.text(".answer > .text") == "Answer four."


def test_what_a_model_writes_stays_text(page: Page) -> None:
    page.script.says(*HOSTILE, thinks=HOSTILE)
    page.ask("Attack")
    assert page.js("return window.hacked") is None
    inside = "#messages :is(script, img, b, iframe, svg, style, [onerror], [onclick])"
    assert page.driver.find_elements("css selector", inside) == []
    links = page.js("return [...document.querySelectorAll('.answer > .text a')].map(a => a.href)")
    assert links == ["https://example.invalid/x.png", "https://example.invalid/y"]
    shown = page.text(".answer > .text")
    for part in ("<script>window.hacked = 1</script>", '<img src=x onerror="window.hacked = 1">'):
        assert part in shown
    assert page.kept()[-1]["text"] == HOSTILE
    page.button("New chat").click()
    deep = "> " * 3000 + "deep"
    page.script.says(deep)
    page.ask("Nest")
    assert page.text(".answer > .text").strip() == deep
    errors = [e for e in page.driver.get_log("browser") if e["level"] == "SEVERE"]
    assert errors == []


def test_thinking_is_folded_and_code_is_coloured_and_copied(page: Page) -> None:
    code = "def f(x):\n    return x + 1  # one more"
    page.script.says(f"Look:\n\n```python\n{code}\n```\n", thinks="Hm, *well*.")
    page.ask("Code")
    assert page.text("details .text") == ""  # folded
    page.find("summary").click()
    assert page.text("details .text") == "Hm, well."
    assert page.text("pre") == code
    page.until(lambda: page.text("pre .keyword") == "def")
    page.driver.execute_cdp_cmd("Browser.grantPermissions", {"permissions": ["clipboardReadWrite"]})
    page.js("""
        window.said = [];
        const copy = document.querySelector(".code button");
        const see = () => said.push(copy.innerText);
        const all = { childList: true, characterData: true, subtree: true };
        new MutationObserver(see).observe(copy, all);
    """)
    page.find(".code button").click()
    page.until(lambda: "Copied" in page.js("return said"))
    read = "const done = arguments[0]; navigator.clipboard.readText().then(done, done)"
    assert page.driver.execute_async_script(read) == code


def test_a_screen_reader_is_told_each_block_once(page: Page) -> None:
    page.js("""
        window.heard = [];
        const hear = (records) => records.forEach((record) =>
          record.addedNodes.forEach((node) => heard.push(node.textContent)));
        const announcer = document.getElementById("announcer");
        new MutationObserver(hear).observe(announcer, { childList: true, subtree: true });
    """)
    page.script.says(*SPOKEN)
    page.ask("Speak")
    assert page.js("return heard") == [
        "The model answers.",
        "First one.",
        "ab",
        "Code, python, 1 line.",
        "Last one.",
        "The answer is complete.",
    ]
    live = page.js("return document.querySelector('#messages').closest('[aria-live]')")
    assert live is None


def test_blocks_are_told_once_wherever_the_text_is_cut(page: Page) -> None:
    told = page.driver.execute_async_script(
        """
        const [text, done] = arguments;
        const all = [...text].map((_, n) => n + 1);
        const told = (Growing) => (cuts) => {
          const heard = [];
          const growing = new Growing(document.createElement("div"), (said) => heard.push(said));
          for (const n of cuts) growing.show(text.slice(0, n));
          growing.show(text, true);
          return heard.map((said) => said.replace(/\\s/g, "")).filter((said) => said);
        };
        import("/page/markdown.js").then(
          ({ Growing }) => done([all, ...all.map((n) => [n])].map(told(Growing))),
          (error) => done(String(error)),
        );
        """,
        SPOKEN,
    )
    assert len(told) == len(SPOKEN) + 1
    for heard in told:
        assert heard == ["Firstone.", "ab", "Code,python,1line.", "Lastone."]


def test_errors_are_said_in_words(page: Page) -> None:
    page.script.refuses(429, "full", **{"retry-after": "3"})
    page.ask("Hello")
    assert "busy with other requests. Try again in 3 seconds." in page.text("[role=alert]")
    page.script.says("Half an", finish=None)
    page.button("Try again").click()
    page.until(lambda: page.text(".live > .text").startswith("Half an"))
    page.script.cut.set()
    page.until(lambda: "lost before the answer was complete" in page.text("[role=alert]"))
    assert page.text(".answer > .text").startswith("Half an")
    page.button("New chat").click()
    page.js("document.querySelector('#question').value = 'word '.repeat(3000)")
    page.ask("end")
    assert "longer than the model's context" in page.text("[role=alert]")
    page.button("New chat").click()
    page.set(temperature=-1)
    page.ask("Hello")
    assert "refused this: temperature" in page.text("[role=alert]")


def test_replay_says_whether_the_bits_are_the_same(page: Page) -> None:
    page.set(max_tokens=12, seed=1)
    page.ask("import os")
    page.button("Replay on the CPU").click()
    page.until(lambda: page.text(".verdict").startswith("Identical: 12 tokens, bit for bit"))
    assert page.js("return document.activeElement.textContent") == "Replay on the CPU"
    kept = page.kept()
    receipt = json.loads(kept[1]["receipt"])
    receipt["tokens"][3]["logits"] = "0" * 64
    kept[1]["receipt"] = json.dumps(receipt)
    page.begin_with(kept)
    page.button("Replay on the CPU").click()
    page.until(lambda: "first at generated token 3: lm_head" in page.text(".verdict"))
    assert page.find(".verdict").get_attribute("data-kind") == "different"


def test_the_page_asks_for_the_key(driver: Any, alone: Model, script: Scripted) -> None:
    with serve(alone, name="m", api_key="secret") as (_, client):
        page = Page(driver, url(client, "/"), script)
        page.open()
        wrong = "This is not the server's API key."
        for key, said in (("wrong", ""), ("€", wrong), ("secret", wrong)):
            page.until(lambda: page.find("#key").is_displayed())
            page.until(lambda said=said: page.text("#key [role=alert]").startswith(said))
            assert page.find("#key input").get_attribute("aria-invalid") == str(bool(said)).lower()
            page.find("#key input").send_keys(key, ENTER)
        page.until(lambda: page.text("#model") == "m")
        assert not page.find("#key").is_displayed()
        page.set(max_tokens=3)
        page.ask("Hello")
        assert page.kept()[-1]["role"] == "assistant"
    page.ask("Still there?")
    assert "does not answer" in page.text("[role=alert]")


def test_the_keyboard_reaches_everything_in_order(page: Page) -> None:
    page.script.says("```python\nx = 1\n```")
    page.ask("Hello")
    found: list[tuple[str, bool]] = []
    while not found or found[-1][0] != "question":  # from there on, and around
        page.driver.switch_to.active_element.send_keys(TAB)
        stop = page.js(
            "const e = document.activeElement, s = getComputedStyle(e);"
            "return e === document.body ? null : [e.innerText || e.id, s.outlineStyle !== 'none']"
        )
        found += [stop] if stop else []  # else it is the browser's own
        assert len(found) < 20
    head = ["Send", "Skip to the message", "New chat", "Settings"]
    assert [name for name, _ in found] == [
        *head,
        *("Edit", "Copy"),  # what was said
        *("Copy", "x = 1", "Copy", "Regenerate"),  # the answer, its code first
        "question",
    ]
    assert all(outlined for _, outlined in found)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_nothing_is_too_wide_and_axe_finds_nothing(page: Page, mode: str) -> None:
    needs("chromium", "axe_core_python")
    axe = (resources.files("axe_core_python") / "axe.min.js").read_text()
    media = {"features": [{"name": "prefers-color-scheme", "value": mode}]}
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    wide = "x" * 200
    page.script.says(
        f"# Head\n\n{wide} `{wide}`\n\n- [x] a\n\n```python\nx = '{wide}'  # y\n```\n\n"
        f"|a|b|\n|-|-|\n|{wide}|1|\n\n> said [there](https://example.invalid)\n\n"
        "```\n" + "line\n" * 60 + "```\n",
        thinks="So.",
    )
    page.ask(wide)
    page.script.refuses(400, "no")
    page.ask("Again")
    sizes = ((1280, 800), (390, 844), (320, 568))
    views = ("", "document.getElementById('settings').showModal()")
    try:
        for width, height in sizes:
            metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
            page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            assert page.js("return document.documentElement.scrollWidth") <= width
            page.js("document.querySelector('.answer > footer').scrollIntoView({ block: 'end' })")
            assert page.js(REACH), "long code's Copy is out of reach"
        assert page.js(EDGES) >= 3  # WCAG 1.4.11
        for view in views:
            page.js(view)
            page.js(axe)
            run = "axe.run().then(arguments[0], arguments[0])"
            found = page.driver.execute_async_script(run)["violations"]
            assert [(f["id"], [n["html"] for n in f["nodes"]]) for f in found] == []
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
