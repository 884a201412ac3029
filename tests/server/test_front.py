"""Streams outlive the servers that began them: processes killed in the middle, two backends."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from isobit.errors import IsobitError
from isobit.server.front import processes as server_processes
from isobit.server.front import replicas as server_replicas
from isobit.server.front.processes import Processes
from isobit.server.front.replicas import Replica, Replicas
from tests.ops.wgpu_support import open_device
from tests.server.conftest import free_port
from tests.server.gathering import gathered
from tests.server.stopping import LINE, kill_when_it_stops, stopping
from tests.server.test_calls import NOTE, WEATHER
from tests.server.test_server import MESSAGES, PROMPT, url, wait_for

KEY = {"ISOBIT_FRONT_KEY": "k"}
SERVE = ("serve", "sample", "--context", "512", "--threads", "1")


@contextmanager
def running(
    *argv: str, port: int, own: Sequence[str] = (sys.executable, "-m", "isobit")
) -> Iterator[subprocess.Popen[bytes]]:
    """``isobit …`` at a port, until the test is over; ``own``: a command in its place."""
    command = [*own, *argv, "--port", str(port)]
    process = subprocess.Popen(command, env=os.environ | KEY, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def at(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def ready(url: str) -> bool:
    try:
        return httpx.get(url + "/ready", timeout=60).status_code == 200
    except httpx.HTTPError:
        return False


def states(front: str) -> list[dict[str, Any]]:
    return httpx.get(front + "/replicas", timeout=60).json()


def continued(front: str) -> float:
    lines = httpx.get(front + "/metrics", timeout=60).text.splitlines()
    return float(
        next(line for line in lines if line.startswith("isobit_front_continued_total")).split()[-1]
    )


def stream(front: str, path: str, body: Any, came: Callable[[], None] = lambda: None) -> Any:
    """The choices and the usage of a stream; what was found in a cache depends on who answered,
    and calls have ids of their own in every answer."""
    text = []
    with httpx.stream("POST", front + path, json=body | {"stream": True}, timeout=300) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            text.append(line)
            if line.startswith("data: "):
                came()
    _, choices, usage = gathered(path, "\n".join(text))
    del usage["prompt_tokens_details"]
    for choice in choices.values():
        for said in choice["said"].values():
            assert not isinstance(said, dict) or said.pop("id").startswith("call_")
    return choices, usage


def streams(front: str, asked: list[tuple[str, Any]], each: int, do: Callable[[], object]) -> Any:
    """All at once; when so many events of one have come, or it ended, something is done."""
    seen, due = [0] * len(asked), threading.Event()

    def came(i: int, events: int = 1) -> None:
        seen[i] += events
        if max(seen) >= each:
            due.set()

    def one(i: int) -> Any:
        try:
            return stream(front, *asked[i], partial(came, i))
        finally:
            came(i, each)

    with ThreadPoolExecutor(len(asked)) as pool:
        found = [pool.submit(one, i) for i in range(len(asked))]
        assert due.wait(240)
        do()
        return [f.result() for f in found]


def many(rng: np.random.Generator, tokens: int = 60) -> list[tuple[str, Any]]:
    common = {"max_tokens": tokens, "stream_options": {"include_usage": True}, "ignore_eos": True}
    wild = {"temperature": 2.0, "logprobs": 2, "n": 2}
    some = {"presence_penalty": 0.5, "frequency_penalty": 0.2, "repetition_penalty": 1.1}
    calls = {"tools": [WEATHER, NOTE], "tool_choice": "required", "ignore_eos": False}
    asked = [
        ("/v1/completions", {"prompt": PROMPT} | common | wild),
        ("/v1/completions", {"prompt": PROMPT, "stop": ["\n\n\n", "zzz", "return x"]} | common),
        ("/v1/chat/completions", {"messages": MESSAGES, "logprobs": True} | common | some),
        ("/v1/chat/completions", {"messages": MESSAGES} | common | calls),
    ]
    return [(path, body | {"seed": int(rng.integers(1 << 40))}) for path, body in asked]


@pytest.mark.parametrize(("killed", "other"), [("cpu", "wgpu"), ("wgpu", "cpu")])
def test_killed_on_one_backend_and_continued_on_another(
    killed: str, other: str, client: openai.OpenAI, rng: np.random.Generator
) -> None:
    open_device()  # or not run
    asked, stops = many(rng, 6), stopping(LINE, int(rng.integers(1, 3)))
    wanted = [stream(url(client, ""), path, body) for path, body in asked]
    ports = free_port(), free_port(), free_port()
    first, second, front = map(at, ports)
    with (
        running(*SERVE, "--backend", killed, port=ports[0], own=stops) as process,
        running(*SERVE, "--backend", other, port=ports[1]),
        running("front", first, second, port=ports[2]),
    ):
        wait_for(lambda: ready(front) and all(s["up"] for s in states(front)))
        # Of replicas that have nothing to do the first is asked: it has at least one of these.
        assert streams(front, asked, 1, partial(kill_when_it_stops, process)) == wanted
        assert continued(front) >= 1


def test_replicas_die_and_are_started_again(rng: np.random.Generator) -> None:
    asked, port = many(rng), free_port()
    front = at(port)
    with running(*SERVE, "--backend", "cpu", "--replicas", "2", port=port) as process:
        wait_for(lambda: ready(front))
        children = [
            int(p) for p in subprocess.check_output(["pgrep", "-P", str(process.pid)]).split()
        ]
        assert len(children) == 2
        wanted = [stream(front, path, body) for path, body in asked]
        assert wanted == streams(front, asked, 9, lambda: os.kill(children[0], signal.SIGKILL))
        wait_for(lambda: all(s["up"] for s in states(front)))
        assert wanted == streams(front, asked, 9, lambda: process.send_signal(signal.SIGHUP))

        def rolled() -> bool:
            found = subprocess.run(
                ["pgrep", "-P", str(process.pid)], capture_output=True, check=False
            ).stdout.split()
            return not {int(p) for p in found} & set(children) and len(found) == 2

        wait_for(lambda: rolled() and all(s["up"] for s in states(front)))
        whole = {"prompt": PROMPT, "max_tokens": 3, "seed": 1}
        done = httpx.post(front + "/v1/completions", json=whole, timeout=60).json()
        assert done["usage"]["completion_tokens"] == 3
        assert httpx.get(front + "/v1/models", timeout=60).json()["object"] == "list"
        assert httpx.get(front + "/nowhere", timeout=60).status_code == 404
        wrong = httpx.post(front + "/v1/completions", json={"prompt": [-1]}, timeout=60)
        assert wrong.status_code == 400
        assert wrong.json()["error"]["param"] == "prompt"
        left = [s["url"] for s in states(front)]
        process.kill()  # the replicas hear of it
        wait_for(lambda: not any(map(ready, left)))


def test_what_a_replica_refuses_ends_the_start() -> None:
    command = [sys.executable, "-m", "isobit", "serve", "nosuch.gguf", "--replicas", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 3
    assert "nosuch.gguf" in done.stderr
    assert "expected it to be ready, it ended with 3" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["front", "http://a:port"], "URL: expected http://HOST:PORT"),
        (
            ["serve", "sample", "--backend", "cuda", "--parts", "2", "--replicas", "2"],
            "--parts: expected 1 with --replicas on cuda",
        ),
    ],
)
def test_what_cannot_be_is_said_in_a_line(argv: list[str], said: str) -> None:
    command = [sys.executable, "-m", "isobit", *argv]
    done = subprocess.run(
        command, env=os.environ | KEY, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_process_that_cannot_be_started_is_started_later(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    async def start(processes: Processes, *, ready: bool) -> None:
        processes._ready = ready
        replicas = Replicas(processes.urls, said.append, {})
        started = asyncio.create_task(processes.start(replicas))
        while not started.done() and len(said) < 2:
            await asyncio.sleep(0.01)
        if started.done():
            await started
        started.cancel()
        await processes.stop()

    async def none(*_: Any, **_settings: Any) -> None:
        raise OSError("no memory")

    monkeypatch.setattr(asyncio, "create_subprocess_exec", none)

    async def both() -> None:
        with pytest.raises(IsobitError, match=r"could not be started \(no memory\)"):
            await start(Processes([], 1, 0, "k", said.append), ready=False)
        await start(Processes([], 1, 0, "k", said.append), ready=True)

    asyncio.run(both())
    assert said == ["replica 0 could not be started (no memory): starting it again"] * 2


def test_a_process_that_starts_as_all_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = asyncio.Event()
    process = SimpleNamespace(terminate=ended.set, wait=ended.wait)

    async def run() -> None:
        processes = Processes([], 1, 1e6, "k", lambda _: None)
        ending = list[asyncio.Task[None]]()

        async def as_all_end(*_: Any, **_settings: Any) -> Any:
            ending.append(asyncio.create_task(processes.stop()))
            await asyncio.sleep(0)  # now it has looked for what there is to end
            return process

        monkeypatch.setattr(asyncio, "create_subprocess_exec", as_all_end)
        started = asyncio.create_task(processes.start(Replicas(processes.urls, print, {})))
        while not ending:
            await asyncio.sleep(0)
        started.cancel()
        await asyncio.wait_for(ending[0], 30)

    asyncio.run(run())


ANSWERING = """
import http.server, socket, sys
class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")
    def log_message(self, *_): pass
server = http.server.HTTPServer(("", 0), Answers, bind_and_activate=False)
server.socket = socket.socket(fileno=int(sys.argv[1]))
server.serve_forever()
"""


@pytest.mark.parametrize("rolls", [False, True])
def test_a_process_that_hangs_is_killed_and_started_again(
    rolls: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in (("_CHECK_SECONDS", 0.05), ("_ANSWER_SECONDS", 0.5)):
        monkeypatch.setattr(server_replicas, name, seconds)
    for name, seconds in (("_HANGS", 0.1), ("_LATE", 0.1), ("_LIVED", 0.0)):
        monkeypatch.setattr(server_processes, name, seconds)
    start, said = asyncio.create_subprocess_exec, list[str]()

    async def answering(*command: str, **settings: Any) -> Any:
        return await start(sys.executable, "-c", ANSWERING, command[-1], **settings)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", answering)

    async def run() -> None:
        processes = Processes([], 2, 0.1, "k", said.append)
        async with asyncio.timeout(60), Replicas(processes.urls, print, {}) as replicas:
            await processes.start(replicas)
            was = list(processes._running)
            assert was[0] is not None
            was[0].send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, was[0].pid, os.WSTOPPED | os.WNOWAIT)
            if rolls:
                await processes.roll()
            while processes._running[0] is was[0] or not replicas.all[0].up:
                await asyncio.sleep(0.05)
            assert was[0].returncode == -signal.SIGKILL
            assert (processes._running[1] is was[1]) == (not rolls)
            await processes.stop()

    asyncio.run(run())
    assert sum("does not answer: it is killed" in line for line in said) == 1


# Where a request goes


def together(n: int) -> Replicas:
    found = Replicas([f"http://127.0.0.1:{i + 1}" for i in range(n)], lambda _: None, {})
    for replica in found.all:
        replica.found()
    return found


def chosen(replicas: Replicas, body: Any, tried: list[Replica] | None = None) -> Replica | None:
    return asyncio.run(replicas.choose(body, 0.01, tried or []))


def test_a_conversation_stays_where_it_is() -> None:
    replicas = together(3)
    talks = [[{"role": "user", "content": f"{i} says " + "much " * 200}] for i in range(6)]
    homes = []
    for talk in talks:
        home = chosen(replicas, {"messages": talk})
        assert home is not None
        home.running += 1
        homes.append(home)
    assert sorted(homes.count(r) for r in replicas.all) == [2, 2, 2]
    for talk, home in zip(talks, homes, strict=True):
        longer = [*talk, {"role": "assistant", "content": "a" * 2000}, talk[0]]
        assert chosen(replicas, {"messages": longer, "model": "x"}) is home


def test_a_beginning_that_all_share_is_spread() -> None:
    replicas = together(4)
    system = {"role": "system", "content": "Be brief. " * 100}
    for i in range(200):
        found = chosen(replicas, {"messages": [system, {"role": "user", "content": f"{i}" * 300}]})
        assert found is not None
        found.running += 1
    loads = [r.running for r in replicas.all]
    assert max(loads) <= 2 * min(loads) + 5, loads


def test_nobody_waits_for_a_replica_of_a_front_that_ends() -> None:
    async def run() -> Replica | None:
        replicas = Replicas(["http://127.0.0.1:1"], lambda _: None, {})
        waits = asyncio.create_task(replicas.choose({}, 60))
        await asyncio.sleep(0)
        await replicas.close()
        return await asyncio.wait_for(waits, 30)

    assert asyncio.run(run()) is None


def test_those_that_are_lost_get_nothing() -> None:
    replicas = together(2)
    first, second = replicas.all
    body = {"prompt": "x" * 1000}
    assert chosen(replicas, body) is first
    asyncio.run(first.missed("gone", at_once=True))
    assert chosen(replicas, body) is second
    second.draining = True
    assert chosen(replicas, body) is None
    second.draining = False
    assert chosen(replicas, body, [second]) is second  # there is no other
    for hostile in (None, 7, [], {"prompt": {"a": "\ud800"}}, {"messages": "x" * 10**6}):
        assert chosen(replicas, json.loads(json.dumps(hostile))) is second
    deep: list[Any] = []
    for _ in range(10**5):
        deep = [deep]
    assert chosen(replicas, {"prompt": deep}) is second
