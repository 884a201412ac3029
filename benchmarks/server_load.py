"""isobit's server beside llama.cpp's under the same load, in turns in one run.

usage: python benchmarks/server_load.py MODEL.gguf LLAMA OUT.json [--streams 64] [--seconds 60]
           [--rounds 1] [--threads N] [--commit SHA]
       python benchmarks/server_load.py MODEL.gguf --requests 10000 [--mixed 0.7]
       python benchmarks/server_load.py MODEL.gguf --restarts 5

LLAMA is a folder with llama-server, whose libraries LD_LIBRARY_PATH must name. A client in a
process of its own keeps so many streamed completions open, each new one with a prompt and an answer
of other lengths, and counts tokens by the usage that ends each stream; both servers get the same
requests in the same order. Client and server share the machine's cores. Every answer must be
complete, else nothing is told of speed. Of isobit, the time between the events of a stream and the
memory before and after are noted, too.

With --requests, isobit's server alone gets so many short ones, and its memory is told on the way;
with --mixed this share of them are of other kinds (several choices, grammars, receipts, …), and a
quarter of these clients leave before their answer is whole;
with --restarts it is killed so many times, and the seconds to the next one's first answer are told.
"""

import argparse
import asyncio
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from isobit.config import EngineConfig

TEXT = Path(__file__).parents[1] / "tests" / "data" / "heldout.txt"
SLOT = 512  # positions of the longest request
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
KINDS = (
    {"n": 3},
    {"guided_regex": "[a-z_]{3,9}"},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
    {"isobit_receipt": True},
    {"logprobs": 3, "echo": True},
    {"logit_bias": {"5": -100}, "presence_penalty": 0.5, "frequency_penalty": 0.1},
    {"stop": ["\n", "def"]},
    {"prompt": ["def f(", "class A:"]},
)
"""What requests of other kinds ask for beside the rest."""


class Load:
    """So many streams at once for so long, or for so many requests."""

    def __init__(self, a):
        self.left, self.longest = (a.requests, 12) if a.requests else (math.inf, 192)
        self.port, self.streams, self.seconds = a.port, a.streams, a.seconds
        self.rng, self.sampled, self.mixed = random.Random(a.seed), a.sampled, a.mixed
        self.text, self.exact = TEXT.read_text(), a.exact
        self.tokens = self.prompt_tokens = self.requests = 0
        self.failed = []
        self.first, self.gaps = [], []

    def body(self):
        """The next request; they are drawn in order, whoever sends them."""
        if self.exact:
            return json.dumps(self.exactly(*self.exact)).encode()
        n = self.rng.randrange(60, 600 if self.longest > 32 else 100)
        at = self.rng.randrange(len(self.text) - 700)
        asked = {
            "prompt": self.text[at : at + n],
            "max_tokens": self.rng.randrange(self.longest // 6, self.longest),
        }
        return json.dumps(asked | self.how() | self.kind()).encode()

    def kind(self):
        other = self.rng.random() < self.mixed
        return self.rng.choice(KINDS) if other else {}

    def exactly(self, prompt, answer, vocabulary):
        """A prompt of so many ids, none like another's, and so many tokens after it."""
        ids = [self.rng.randrange(vocabulary) for _ in range(prompt)]
        return {"prompt": ids, "max_tokens": answer, "ignore_eos": True} | self.how()

    def how(self):
        asked = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0}
        if self.rng.random() < self.sampled:
            asked |= {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}
            asked["seed"] = self.rng.randrange(1 << 31)
        return asked

    async def run(self):
        self.end = time.monotonic() + self.seconds
        await asyncio.gather(*(self.stream() for _ in range(self.streams)))

    async def stream(self):
        while time.monotonic() < self.end and self.left > 0:
            self.left -= 1
            try:
                await self.answer()
            except (OSError, ValueError, asyncio.IncompleteReadError) as error:
                self.failed.append(repr(error))

    async def answer(self):
        body = self.body()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode())
        writer.write(body)
        last, tail, came = time.monotonic(), b"", self.first
        if self.rng.random() < self.mixed / 4:
            await reader.read(1 << 10)
            writer.close()
            self.requests += 1
            return
        while part := await reader.read(1 << 16):
            now = time.monotonic()
            for _ in range(part.count(b"\r\ndata: {")):  # none in the head of the answer
                came.append(now - last)
                last, came = now, self.gaps
            tail = (tail + part)[-4000:]
        writer.close()
        if not tail.rstrip(b"\r\n0").endswith(b"[DONE]"):
            raise ValueError(f"an answer that ends with {tail[-200:]!r}")
        usage = [line for line in tail.split(b"\n") if b'"completion_tokens":' in line][-1]
        used = json.loads(usage.removeprefix(b"data: "))["usage"]
        self.tokens += used["completion_tokens"]
        self.prompt_tokens += used["prompt_tokens"]
        self.requests += 1


def percentile(values, share):
    return round(1e3 * sorted(values)[int(share * (len(values) - 1))], 2) if values else None


def client(a):
    """The process that asks; prints what it found."""
    load = Load(a)
    begun = time.time()
    asyncio.run(load.run())
    found = {
        "requests": load.requests,
        "failed": load.failed,
        "tokens": load.tokens,
        "prompt tokens": load.prompt_tokens,
        "began, ended": [begun, time.time()],
        "first": [round(s, 6) for s in load.first],
        "gaps": [round(s, 6) for s in load.gaps],
    }
    print(json.dumps(found))


def asked(port, streams, *options, processes=1, seed=1):
    """What so many streams, of one or more client processes, find together.

    Raises SystemExit if an answer fails.
    """
    ask = [sys.executable, __file__, "client", "--port", str(port), *map(str, options)]
    share = [streams // processes + (i < streams % processes) for i in range(processes)]
    clients = [
        subprocess.Popen(
            [*ask, "--streams", str(n), "--seed", str(seed + 1000 * i)], stdout=subprocess.PIPE
        )
        for i, n in enumerate(share)
    ]
    parts = [json.loads(each.communicate()[0]) for each in clients]
    began, ended = zip(*(part["began, ended"] for part in parts), strict=True)
    seconds = max(ended) - min(began)
    names = "requests", "failed", "tokens", "prompt tokens", "first", "gaps"
    total = {name: parts[0][name] for name in names}
    for part in parts[1:]:
        total = {name: total[name] + part[name] for name in names}
    if total["failed"]:
        raise SystemExit(f"{len(total['failed'])} answers failed: {total['failed'][0]}")
    prompt, tokens = total["prompt tokens"], total["tokens"]
    return {
        "began, ended": [min(began), max(ended)],
        "requests": total["requests"],
        "generated tokens": tokens,
        "generated tokens/s": round(tokens / seconds, 1),
        "prompt tokens/s": round(prompt / seconds, 1),
        "all tokens/s": round((tokens + prompt) / seconds, 1),
        "seconds": round(seconds, 3),
        "ms to the first piece p50, p99": [percentile(total["first"], s) for s in (0.5, 0.99)],
        "ms between pieces p50, p99": [percentile(total["gaps"], s) for s in (0.5, 0.99)],
    }


class Server:
    """One of the two, for as long as the block lasts."""

    def __init__(self, command, port, log=subprocess.DEVNULL):
        self.port = port
        self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def __enter__(self):
        for _ in range(1800):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5)
                return self
            except OSError:
                if self.process.poll() is not None:
                    raise SystemExit(f"a server ended with {self.process.returncode}") from None
                time.sleep(0.1)
        raise SystemExit("a server did not start")

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def memory(self):
        """Resident MB that are not pages of a file, and seconds of processor time."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        lines = dict(line.split(":", 1) for line in status.splitlines())
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return round(int(lines["RssAnon"].split()[0]) / 1024, 1), ticks


def measure(command, port, a, seed):
    with Server(command, port) as server:
        ask = port, a.streams, "--sampled", a.sampled, "--seconds"
        asked(*ask, 3, seed=seed)
        before, used = server.memory()
        found = asked(*ask, a.seconds, seed=seed)
        after, total = server.memory()
        found["resident MB before, after"] = [before, after]
        found["processor seconds of the server"] = round(total - used, 1)
    return found


def memory(command, a):
    """Resident MB of isobit's server after some of so many requests, and after all."""
    done = 0
    with Server(command, a.port) as server:
        ask = a.port, a.streams, "--seconds", 86400, "--sampled", a.sampled
        ask += "--mixed", a.mixed, "--requests"
        for until in (a.requests // 10, a.requests // 2, a.requests):
            told = asked(*ask, until - done, seed=a.seed + done)
            assert told["requests"] == until - done
            done = until
            print(f"after {done} requests: {server.memory()[0]} MB", flush=True)


def restarts(command, a):
    """Seconds from a start, after SIGKILL of the one before, to an answer."""
    url = f"http://127.0.0.1:{a.port}/v1/completions"
    ask = urllib.request.Request(url, b'{"prompt": "def", "max_tokens": 3}')
    ask.add_header("content-type", "application/json")
    for i in range(1 + a.restarts):
        begun, answered = time.monotonic(), False
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not answered:
            try:
                with urllib.request.urlopen(ask, timeout=60) as answer:
                    answered = bool(json.load(answer)["choices"])
            except OSError:
                if process.poll() is not None:
                    raise SystemExit(f"a server ended with {process.returncode}") from None
                time.sleep(0.01)
        if i:
            print(f"answered after {time.monotonic() - begun:.2f} s", flush=True)
        process.kill()
        process.wait()


def main():
    p = argparse.ArgumentParser()
    p.add_argument("model")
    p.add_argument("llama", nargs="?")
    p.add_argument("out", type=Path, nargs="?")
    p.add_argument("--streams", type=int, default=64)
    p.add_argument("--seconds", type=float, default=60)
    p.add_argument("--rounds", type=int, default=1)
    p.add_argument("--threads", type=int, default=EngineConfig().cores)
    p.add_argument("--sampled", type=float, default=0.5, help="share of sampled requests")
    p.add_argument("--mixed", type=float, default=0, help="share of requests of other kinds")
    p.add_argument("--port", type=int, default=18123)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--requests", type=int, default=0)
    p.add_argument("--restarts", type=int, default=0)
    p.add_argument("--exact", type=int, nargs=3, metavar=("PROMPT", "ANSWER", "VOCABULARY"))
    p.add_argument("--commit", default="")
    a = p.parse_args()
    if a.model == "client":
        return client(a)
    threads, slots = str(a.threads), a.streams * SLOT
    ours = [sys.executable, "-m", "isobit", "serve", a.model, "--backend", "cpu", "-t", threads]
    ours += ["--port", str(a.port), "-c", "4096", "--sequences", str(max(slots // 4096, 1))]
    if a.restarts:
        return restarts(ours, a)
    if a.requests:  # and a KV cache that is full of what was asked before long
        return memory([*ours[:-1], "2"], a)
    theirs = [f"{a.llama}/llama-server", "-m", a.model, "-t", threads, "-np", str(a.streams)]
    theirs += ["-c", str(slots), "--port", str(a.port + 1), "-ngl", "0", "--no-webui"]
    rounds, others = [], os.getloadavg()
    for i in range(a.rounds):
        row = {
            "isobit": measure(ours, a.port, a, a.seed + i),
            "llama.cpp": measure(theirs, a.port + 1, a, a.seed + i),
        }
        rounds.append(row)
        print(json.dumps(row, indent=1), flush=True)
    ratios = [
        r["isobit"]["generated tokens/s"] / r["llama.cpp"]["generated tokens/s"] for r in rounds
    ]
    work = [
        [r[name]["generated tokens"] / r[name]["processor seconds of the server"] for r in rounds]
        for name in ("isobit", "llama.cpp")
    ]
    found = {
        "commit": a.commit,
        "date": datetime.now(UTC).date().isoformat(),
        "load": f"{a.streams} streams for {a.seconds:g} s, {a.threads} threads, "
        f"{a.sampled:g} of the requests sampled",
        "load average of the machine before": [round(x, 1) for x in others],
        "ratio of generated tokens/s": round(median(ratios), 3),
        "ratio of generated tokens a second of the server's processor time": round(
            median(x / y for x, y in zip(*work, strict=True)), 3
        ),
        "rounds": rounds,
    }
    print("ratio", found["ratio of generated tokens/s"])
    a.out.write_text(json.dumps(found, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
