"""A cluster of Ray on this machine: what dies in it goes on elsewhere, with the same bits."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import numpy as np
import pytest

import isobit
from isobit.cli import main
from isobit.errors import CacheLost, IsobitError
from isobit.verify.receipt import Recorder
from tests.helpers.expected import needs
from tests.server.conftest import free_port
from tests.server.test_batch import answers, write
from tests.server.test_front import at, continued, many, stream, streams
from tests.server.test_server import wait_for

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's own
SERVED: dict[str, Any] = {"backend": "cpu", "context": 512, "replicas": 2, "grace": 0}


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A cluster of this process and its children, on loopback."""
    found = needs("ray", "ray.serve") and needs("ray", "ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else there is a key in the home folder
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_SERVE_LOG_TO_STDERR", "0")
        found.init(
            "local",
            num_cpus=6,  # of which each process takes one; they are two in truth
            object_store_memory=80 << 20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _node_ip_address="127.0.0.1",
        )
        yield found
        found.shutdown()


def processes(name: str) -> set[int]:
    """Of Ray's actors of a name in this session."""
    found = subprocess.run(["pgrep", "-f", f"ray::{name}"], stdout=subprocess.PIPE, check=False)
    here = os.getsid(0)
    return {pid for pid in map(int, found.stdout.split()) if os.getsid(pid) == here}


def servers() -> set[int]:
    return processes("ServeReplica:default:Server")


@pytest.fixture(scope="module")
def front(ray: Any) -> Iterator[str]:
    from ray import serve  # noqa: PLC0415  # an extra

    from isobit.server.front.on_ray import AppSettings, app  # noqa: PLC0415

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(app(AppSettings(**SERVED)))
    yield at(port)
    serve.delete("default")


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--workers", "cpu=2"], 2, "--workers: expected --ray beside it"),
        (["--ray", "--workers", "tpu=2"], 2, "expected backends and numbers, such as cpu=4"),
        (["--ray"], 2, "ray: not installed: pip install '.[ray]'"),
        (["--ray"], 4, "RAY_ADDRESS: no cluster at 127.0.0.1:1"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    more: list[str],
    code: int,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before there is a cluster, and first without Ray."""
    if "not installed" in said:
        monkeypatch.setitem(sys.modules, "ray", None)
    elif "no cluster" in said:
        needs("ray", "ray")
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    write(tmp_path / "in", 1)
    assert main(["batch", str(tmp_path / "in"), "-o", str(tmp_path / "out"), *more]) == code
    assert said in capsys.readouterr().err


def test_what_begins_alike_goes_to_the_same_server(front: str) -> None:
    url, body = front + "/v1/completions", {"prompt": "def f(x):\n" * 50, "max_tokens": 1}
    long = {"prompt": "import", "max_tokens": 400, "ignore_eos": True, "stream": True}
    cached = []
    with httpx.stream("POST", url, json=long, timeout=60) as busy:  # so that the other is free
        lines = busy.iter_lines()
        next(lines)
        httpx.post(url, json=body, timeout=60)
        for _ in lines:
            pass
    for _ in range(2):
        said = httpx.post(url, json=body, timeout=60).json()
        cached.append(said["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert all(cached), cached


def test_a_killed_server_is_gone_on_with_and_started_again(
    front: str, rng: np.random.Generator
) -> None:
    for tokens in (120, 240, 480):  # streams may be through before
        asked = many(rng, min(tokens, 400))
        wanted = [stream(front, *each) for each in asked]
        wait_for(lambda: len(servers()) == 2)
        before = servers()
        assert streams(front, asked, 9, partial(os.kill, min(before), signal.SIGKILL)) == wanted
        wait_for(lambda: len(servers()) == 2)
        assert servers() != before
        if continued(front):
            return
    raise AssertionError("no stream was cut")


def test_an_update_replaces_servers_under_their_streams(
    front: str, rng: np.random.Generator
) -> None:
    from ray import serve  # noqa: PLC0415

    from isobit.server.front.on_ray import AppSettings, app  # noqa: PLC0415

    asked, before = many(rng, 300), servers()
    wanted = [stream(front, *each) for each in asked]
    updating = Thread(
        target=lambda: serve.run(app(AppSettings(**SERVED | {"replicas": 1}, waiting=7)))
    )
    assert streams(front, asked, 3, updating.start) == wanted
    updating.join()
    wait_for(lambda: not before & servers() and len(servers()) == 1)
    assert httpx.get(front + "/ready", timeout=60).json()["status"] == "ready"


def test_a_batch_whose_workers_and_driver_are_killed(
    ray: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "in", 30, max_tokens=16)
    whole, out = tmp_path / "whole", tmp_path / "out"
    common = ["batch", str(tmp_path / "in"), "--context", "256", "--threads", "1"]
    assert main([*common, "-o", str(whole), "--backend", "cpu"]) == 0
    command = [*common, "-o", str(out), "--ray", "--workers", "cpu=1,reference=1", "--at-once", "2"]

    def lines() -> int:
        return out.read_bytes().count(b"\n") if out.exists() else 0

    address = ray.get_runtime_context().gcs_address
    driver = subprocess.Popen(
        [sys.executable, "-m", "isobit", *command], env=os.environ | {"RAY_ADDRESS": address}
    )
    wait_for(lambda: lines() >= 3 or driver.poll() is not None)
    before = lines()
    os.kill(min(processes("Worker")), signal.SIGKILL)
    wait_for(lambda: lines() >= before + 3 or driver.poll() is not None)
    assert driver.poll() is None, "over too soon to see anything"
    driver.kill()
    driver.wait()
    kept = out.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    assert main([*command, "--audit", "0.2"]) == 0
    assert "identical on workers of cpu, reference" in capsys.readouterr().out
    assert out.read_bytes().startswith(kept)
    found = [
        {name: a["body"]["choices"][0]["isobit_receipt"] for name, a in answers(path).items()}
        for path in (whole, out)
    ]
    assert len(found[0]) == 30
    assert {r["backend"] for r in found[1].values()} == {"cpu", "reference"}
    assert [{n: r["tokens"] for n, r in f.items()} for f in found[:1]] == [
        {n: r["tokens"] for n, r in f.items()} for f in found[1:]
    ]


def test_a_batch_without_room_is_refused(
    ray: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "in", 1)
    command = ["batch", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--ray"]
    assert main([*command, "--workers", "cpu=1,cuda=1", "--threads", "1"]) == 2
    assert "found none for one of cuda that needs 1 CPU and 1 GPU" in capsys.readouterr().err


def test_stages_are_actors_and_one_that_dies_begins_again(
    ray: Any, rng: np.random.Generator
) -> None:
    places = ["ray:0:5@cpu", "ray:5:8@cpu"]
    prompt = rng.integers(0, 1000, 200).tolist()  # several parts of it in flight
    with (
        isobit.load("sample", backend="cpu", context=512) as here,
        isobit.load("sample", context=512, threads=1, stages=places) as model,
    ):
        wanted = Recorder()
        text = here.generate(prompt, max_tokens=200, seed=3, temperature=1.0, watch=wanted).text
        assert np.array_equal(model.logits(prompt), here.logits(prompt))
        sequence = model.new_sequence()
        model.forward(sequence, prompt[:9])
        recorder, said = Recorder(), []
        scoring = Thread(target=lambda: said.append(model.score([prompt] * 2)))
        stream = model.stream(prompt, max_tokens=200, seed=3, temperature=1.0, watch=recorder)
        pieces = [next(stream) for _ in range(5)]
        scoring.start()
        os.kill(min(processes("StageActor")), signal.SIGKILL)
        pieces += stream
        scoring.join()
        assert model.backend.losses == 1
        assert "".join(pieces) == text
        assert recorder.receipt().tokens == wanted.receipt().tokens
        assert np.array_equal(said[0], [here.score(prompt)] * 2)
        with pytest.raises(CacheLost, match="close it and start again"):
            model.forward(sequence, prompt[:1])
        sequence.close()
        assert np.array_equal(model.prefill(sequence, prompt), here.logits(prompt, [-1])[0])


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("ray:0:5", "expected ray:FIRST:END@BACKEND"),
        ("ray:0:99@cpu", "layers: expected a range within 0:8, got 0:99"),
        ("ray:0:8@cuda", "expected room for .*GPU.* in the cluster"),
    ],
)
def test_stages_that_cannot_be(
    ray: Any, place: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from isobit.backends.distributed import on_ray  # noqa: PLC0415  # an extra

    if "cuda" in place:
        monkeypatch.setattr(on_ray, "_ROOM", 0.1)
    with pytest.raises(IsobitError, match=said):
        isobit.load("sample", context=64, stages=[place])
