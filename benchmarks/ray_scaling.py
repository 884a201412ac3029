"""Servers that Ray adds under load and takes away after it, while every answer stays what it is.

usage: python benchmarks/ray_scaling.py OUT.json [--model sample] [--most 2] [--streams 8]

An application of Ray Serve as docs/scaling.md has it, on a cluster of this machine, with short
delays: some streams at a time, until there are as many servers as may be, then some more; then
none, until there is one. Every text is compared with that of the one server, alone, before. The
exit code is 1 if one differs, or if there never were as many servers, or one alone afterwards.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import yaml
from batches import origin

TOKENS, PATIENCE = 300, 120


def servers(session):
    """How many there are among the processes of a session."""
    found = subprocess.run(
        ["pgrep", "-s", str(session), "-f", "ray::ServeReplica:default:Server"],
        stdout=subprocess.PIPE,
        check=False,
    )
    return len(found.stdout.split())


def configuration(a, port):
    """Serve's own file."""
    scaling = {"min_replicas": 1, "max_replicas": a.most, "target_ongoing_requests": 2}
    scaling |= {"metrics_interval_s": 1, "look_back_period_s": 3}
    scaling |= {"upscale_delay_s": 3, "downscale_delay_s": 10}
    one = {"name": "default", "import_path": "isobit.server.front.on_ray:app"}
    one["args"] = {"model": a.model, "backend": "cpu", "context": 512, "threads": 1}
    one["deployments"] = [{"name": "Server", "autoscaling_config": scaling}]
    http = {"host": "127.0.0.1", "port": port}
    return yaml.safe_dump({"http_options": http, "applications": [one]})


def wait_for(what, seconds=PATIENCE):
    """Seconds until something is true; None if it never is."""
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        if what():
            return round(time.perf_counter() - begun, 1)
        time.sleep(0.2)
    return None


def ready(url):
    """Whether the application answers."""
    try:
        return httpx.get(url + "/ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def answer(url, number):
    """The text of one request."""
    body = {"prompt": f"def f{number}(", "max_tokens": TOKENS, "ignore_eos": True, "seed": 1}
    said = httpx.post(
        url + "/v1/completions", json=body | {"temperature": 1.0}, timeout=PATIENCE
    ).json()
    return said["choices"][0]["text"]


def load(a, url, session):
    """Streams until there are as many servers as may be, and a round more; what came of them."""
    wanted = [answer(url, i) for i in range(a.streams)]
    found = {"answers": 0, "texts that differ": 0, "failed": 0}
    enough = threading.Event()

    def stream(number):
        last = False
        while not last:
            last = enough.is_set()
            try:
                found["texts that differ"] += answer(url, number) != wanted[number]
                found["answers"] += 1
            except (httpx.HTTPError, KeyError, ValueError):
                found["failed"] += 1

    threads = [threading.Thread(target=stream, args=(i,)) for i in range(a.streams)]
    for t in threads:
        t.start()
    found["s to the most servers"] = wait_for(lambda: servers(session) >= a.most)
    enough.set()
    for t in threads:
        t.join()
    found["s from the end of the load to one server"] = wait_for(lambda: servers(session) == 1)
    return found


def main():
    p = argparse.ArgumentParser()
    p.add_argument("out")
    p.add_argument("--model", default="sample")
    p.add_argument("--most", type=int, default=2)
    p.add_argument("--streams", type=int, default=8)
    p.add_argument("--commit", default="")
    a = p.parse_args()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "serve.yaml"
        file.write_text(configuration(a, port))
        quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
        command = [sys.executable, "-m", "ray.serve.scripts", "run", str(file)]
        with (Path(folder) / "log").open("wb") as log:
            child = subprocess.Popen(
                command, stdout=log, stderr=log, env=os.environ | quiet, start_new_session=True
            )
        url = f"http://127.0.0.1:{port}"
        found = {"s to ready": wait_for(lambda: ready(url))}
        try:
            if found["s to ready"] is not None:
                found |= load(a, url, child.pid)
        finally:
            child.send_signal(signal.SIGINT)
            try:
                child.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
            if found["s to ready"] is None:
                print((Path(folder) / "log").read_text()[-4000:])
    Path(a.out).write_text(json.dumps(origin(a.model, a.commit) | found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    times = [v for k, v in found.items() if k.startswith("s ")]
    wrong = found.get("texts that differ", 1) + found.get("failed", 1)
    raise SystemExit(bool(wrong or None in times))


if __name__ == "__main__":
    main()
