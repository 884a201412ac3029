"""Receipts that the server computes again; the files of its page."""

import asyncio
import json
import signal
import subprocess
import sys
from contextlib import suppress
from typing import Any

import httpx
import openai
import pytest

from isobit.runtime.model import Model
from isobit.server import replay as replaying
from tests.server.conftest import serve
from tests.server.test_server import PROMPT, head, raw, url, wait_for


def answered(client: openai.OpenAI, **settings: Any) -> dict[str, Any]:
    body = {"prompt": PROMPT, "max_tokens": 7, "seed": 3, "isobit_receipt": True} | settings
    answer = httpx.post(url(client, "/v1/completions"), json=body, timeout=60).json()
    return answer["choices"][0]["isobit_receipt"]


def replayed(client: openai.OpenAI, receipt: object, **more: Any) -> httpx.Response:
    body = {"isobit_receipt": receipt}
    return httpx.post(url(client, "/replay"), json=body, timeout=60, **more)


def test_a_verdict_on_a_receipt(client: openai.OpenAI) -> None:
    receipt = answered(client, guided_regex="[a-z ]{9,}")
    assert (receipt["activation_bits"], receipt["activation_planes"]) == (16, 2)
    verdict = replayed(client, receipt).json()
    assert (verdict["identical"], verdict["tokens"], verdict["difference"]) == (True, 7, None)
    receipt["tokens"][4]["token"] ^= 1
    verdict = replayed(client, receipt).json()
    assert verdict["identical"] is False
    assert verdict["difference"] == {"index": 4, "stage": "sampling", "layer": None}
    assert "first at generated token 4: sampling" in verdict["message"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_sha256": "0" * 64}, "model sha256"),
        ({"prompt": [10**9]}, "token id"),
        ({"prompt": [5] * 2000}, "at most 1024 tokens"),
        ({"prompt": [5] * 1018}, "at most 1024 tokens"),  # and 7
        ({"tokens": []}, "at least one"),
        ({"format": "other"}, "isobit receipt"),
        ({"numerics": 999}, "numerics"),
        ({"sampling": {}}, "sampling"),
    ],
)
def test_what_is_no_receipt_of_this_model_is_refused(
    client: openai.OpenAI, change: dict[str, Any], said: str
) -> None:
    answer = replayed(client, answered(client) | change)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == "isobit_receipt"
    assert said in error["message"]


def test_replays_wait_for_each_other_and_end_with_their_clients(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    receipt, running, most = answered(client), [], 0

    async def forever(*_: object) -> None:
        nonlocal most
        code = "import time; time.sleep(600)"
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
        running.append(process)
        most = max(most, len(running))
        try:
            await process.wait()
        finally:
            process.kill()
            await process.wait()
            running.remove(process)

    monkeypatch.setattr(replaying, "_computed", forever)
    monkeypatch.setattr(replaying, "MOST_WAITING", 2)
    content = json.dumps({"isobit_receipt": receipt}).encode()

    def full() -> bool:
        with suppress(httpx.TimeoutException):  # it was let in, and leaves
            answer = httpx.post(url(client, "/replay"), content=content, timeout=2)
            return answer.status_code == 429 and answer.headers["retry-after"] == "1"
        return False

    with raw(client) as one, raw(client) as two, raw(client) as three:
        for each in (one, two, three):
            each.sendall(head("/replay", len(content)) + content)
        wait_for(full)
        wait_for(lambda: most)
        assert client.completions.create(model="m", prompt=PROMPT, max_tokens=1).choices
    wait_for(lambda: not running)
    assert most == 1
    monkeypatch.undo()
    assert replayed(client, receipt).json()["identical"]


def test_a_process_that_dies_is_an_error_and_harms_nobody(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    receipt = answered(client)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    answer = replayed(client, receipt)
    assert answer.status_code == 500
    assert "ended with 1" in answer.json()["error"]["message"]
    monkeypatch.undo()
    assert replayed(client, receipt).json()["identical"]


def test_a_process_says_in_a_line_that_the_file_is_gone(client: openai.OpenAI) -> None:
    command = [sys.executable, "-m", "isobit.server.replay", "nosuch.gguf"]
    receipt = json.dumps(answered(client))
    done = subprocess.run(
        command, input=receipt, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert "nosuch.gguf" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_process_ends_by_itself() -> None:
    code = "from isobit.server import replay as r; r.MOST_SECONDS = 1; r.main()"
    with subprocess.Popen([sys.executable, "-c", code, "x"], stdin=subprocess.PIPE) as process:
        assert process.wait(120) == -signal.SIGALRM  # though nobody ends its standard input


def test_a_process_has_no_keys(alone: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ONE", "ISOBIT_FRONT_KEY", "OTHER"):
        monkeypatch.setenv(name, f"the value of {name}")
    keys = {"api_key": "the value of ONE", "front_key": "the value of ISOBIT_FRONT_KEY"}
    with serve(alone, **keys) as (service, _):
        found = replaying._environment(service)
    assert found.get("OTHER") == "the value of OTHER"
    assert not set(keys.values()) & set(found.values())


def test_the_files_of_the_page(alone: Model) -> None:
    with serve(alone, api_key="secret") as (_, client):
        page = httpx.get(url(client, "/"), timeout=60)  # without a key
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert page.headers["x-content-type-options"] == "nosniff"
        policy = page.headers["content-security-policy"]
        assert policy.startswith("default-src 'self'; ")
        assert "unsafe" not in policy
        assert "require-trusted-types-for 'script'" in policy
        again = httpx.get(
            url(client, "/"), headers={"if-none-match": page.headers["etag"]}, timeout=60
        )
        assert (again.status_code, again.content) == (304, b"")
        for name, kind in (
            ("main.js", "text/javascript"),
            ("page.css", "text/css"),
            ("icon.svg", "image/svg+xml"),
            ("vendor/prism/LICENSE", "text/plain"),
            ("vendor/marked/LICENSE", "text/plain"),
            ("vendor/marked/marked.esm.js", "text/javascript"),
        ):
            file = httpx.get(url(client, f"/page/{name}"), timeout=60)
            assert file.headers["content-type"].startswith(kind)
            assert file.headers["x-content-type-options"] == "nosniff"
        for path in ("/page/../app.py", "/page/%2e%2e/app.py", "/page/", "/page/index.html"):
            assert httpx.get(url(client, path), timeout=60).status_code == 401
        assert httpx.post(url(client, "/"), timeout=60).status_code == 401
        assert replayed(client, {}).status_code == 401


def test_there_need_be_no_page(alone: Model) -> None:
    with serve(alone, page=False) as (_, client):
        for path in ("/", "/page/main.js"):
            assert httpx.get(url(client, path), timeout=60).status_code == 404


def test_pages_of_other_origins_are_let_in_where_that_is_said(alone: Model) -> None:
    asked = {"origin": "https://chat.example", "access-control-request-method": "POST"}
    asked["access-control-request-headers"] = "authorization,content-type"
    path = "/v1/chat/completions"
    with serve(alone, api_key="secret", origins=["https://chat.example"]) as (_, client):
        # Browsers send no key with it.
        answer = httpx.options(url(client, path), headers=asked, timeout=60)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://chat.example"
        other = httpx.options(
            url(client, path), headers=asked | {"origin": "https://x.example"}, timeout=60
        )
        assert "access-control-allow-origin" not in other.headers
        refused = httpx.post(url(client, path), headers=asked, timeout=60)
        assert refused.status_code == 401  # and says so to the page
        assert refused.headers["access-control-allow-origin"] == "https://chat.example"
    with serve(alone) as (_, client):
        answer = httpx.options(url(client, path), headers=asked, timeout=60)
        assert "access-control-allow-origin" not in answer.headers
