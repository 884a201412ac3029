"""isobit's server on a GPU: bits first, then what clients get beside what the device gives alone.

usage: python benchmarks/server_gpu.py MODEL.gguf OUT [--seconds 300] [--streams 1,8,32,128]
           [--prompt 512] [--answer 256] [--check 200] [--backend cuda] [--commit SHA]

First so many choices are asked for together (prompts that begin alike, samplings, grammars, n > 1,
streams that are closed in their midst); their receipts must be those of each of them alone, which
a model in this process computes on the same device; a few are replayed on the CPU. Then clients in
processes of their own keep so many streams open, each request with a prompt and an answer of so
many tokens, none in the cache. Beside it stand the same tokens by the model in this process with
the server idle: prompts chunk by chunk, and steps of as many sequences. OUT/server_gpu.json gets
every figure, OUT/server.log what the server said; the table comes last. The exit code is 1 if a
receipt differs. Rounds become fewer and answers shorter where the seconds would not be enough.

With --streams "" the bits alone are looked at, of any backend.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import simulated
from batches import batch, origin
from recorded import told
from server_load import Server, asked

from isobit.backends.base import ARGMAX
from isobit.config import EngineConfig
from isobit.runtime.model import Model
from isobit.verify.receipt import Receipt, Recorder, replay

SAMPLINGS = (
    {"temperature": 0},
    {"temperature": 1},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 40},
    {"temperature": 1.2, "min_p": 0.05, "repetition_penalty": 1.1, "presence_penalty": 0.5},
    {"temperature": 0, "frequency_penalty": 0.4, "logit_bias": {"5": 2.0, "9": -1e6}},
    {"temperature": 1, "guided_regex": "[a-z]{3,9}( [0-9]+)*"},
    {
        "temperature": 0.9,
        "guided_json": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
)
LENGTHS = 1, 7, 40, 64, 70, 130, 300
DEPTH = 128  # tokens after the prompt at which steps are measured


def bodies(rng, choices, vocab):
    """Requests of so many choices in all: (body, whether the client leaves)."""
    texts = [[rng.randrange(vocab) for _ in range(max(LENGTHS))] for _ in range(5)]
    left = choices
    while left:
        n = min(rng.choice((1, 1, 2, 3)), left)
        asked = {"prompt": rng.choice(texts)[: rng.choice(LENGTHS)], "n": n}
        asked |= {"max_tokens": rng.randrange(1, 12), "seed": rng.randrange(1 << 40)}
        asked |= rng.choice(SAMPLINGS) | {"isobit_receipt": True}
        left -= n
        yield asked, False
        if rng.random() < 0.2:
            yield asked | {"max_tokens": 200, "n": 1, "ignore_eos": True, "stream": True}, True


async def together(port, requests, rng):
    """All receipts of requests that are asked at once, but for those who leave."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=300, limits=limits, trust_env=False) as client:

        async def ask(body, leaves):
            await asyncio.sleep(rng.random() / 2)
            url = f"http://127.0.0.1:{port}/v1/completions"
            if not leaves:
                answer = await client.post(url, json=body)
                answer.raise_for_status()
                return [choice["isobit_receipt"] for choice in answer.json()["choices"]]
            most = rng.choice((0, 1, 5))
            async with client.stream("POST", url, json=body) as stream:
                lines = stream.aiter_lines()
                for _ in range(most):
                    await anext(lines, None)
            return []

        found = await asyncio.gather(*(ask(*each) for each in requests))
    return [receipt for some in found for receipt in some]


def alone(model, data):
    """Whether a receipt is that of the same request alone, with nothing from a cache."""
    receipt, recorder = Receipt.of(data, "answer"), Recorder()
    sampling = receipt.settings
    constraint = sampling.grammar and model.grammars.constraint(sampling.grammar)
    how = {"constraint": constraint, "salt": None, "watch": recorder}
    list(model.generations.submit(receipt.prompt, len(receipt.tokens), sampling, **how))
    return recorder.receipt() == receipt


class Bare:
    """What a model gives without a server."""

    def __init__(self, model, prompt):
        self.backend, self.chunk, self.start = model.backend, model.engine.chunk, prompt + DEPTH
        self.pages = -(-(self.start + DEPTH) // 64)
        self.ids = np.random.default_rng().integers(0, model.config.vocab, 1 << 16)

    def prompts(self, tokens):
        """Seconds for a prompt of so many tokens."""
        pages = np.arange(self.pages, dtype=np.int32)[None]
        best = []
        for _ in range(3):
            begin = time.perf_counter()
            for at in range(0, tokens, self.chunk):
                n = min(self.chunk, tokens - at)
                self.backend.run(batch(self.ids[at : at + n], at, pages, [n - 1]), ARGMAX)
            best.append(time.perf_counter() - begin)
        return min(best)

    def steps(self, n, count=16):
        """Seconds for a step of n sequences: together, or in parts if that is faster."""
        tokens = self.ids[:n].astype(np.int32)
        pages = np.arange(n * self.pages, dtype=np.int32).reshape(n, self.pages)
        positions = np.full(n, self.start, np.int32)
        found = {}
        for parts in (1, 2) if n > 64 else (1,):
            each = [slice(i * n // parts, (i + 1) * n // parts) for i in range(parts)]
            for i in range(4):  # the first captures
                begin = time.perf_counter()
                for s in each:
                    self.backend.greedy(tokens[s], positions[s], pages[s], count)
                if i:
                    spent = (time.perf_counter() - begin) / count
                    found[parts] = min(spent, found.get(parts, spent))
        return min(found.values()), found


def main():
    p = argparse.ArgumentParser()
    p.add_argument("model")
    p.add_argument("out", type=Path)
    p.add_argument("--backend", default="cuda")
    p.add_argument("--streams", default="1,8,32,128")
    p.add_argument("--prompt", type=int, default=512)
    p.add_argument("--answer", type=int, default=256)
    p.add_argument("--check", type=int, default=200, help="choices whose receipts are compared")
    p.add_argument("--replay", type=int, default=2, help="receipts replayed on the CPU")
    p.add_argument("--seconds", type=float, default=300)
    p.add_argument("--sampled", type=float, default=0.5, help="share of sampled requests")
    p.add_argument("--clients", type=int, default=4, help="processes")
    p.add_argument("--port", type=int, default=18140)
    p.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    p.add_argument("--simulated", action="store_true", help="see simulated.py")
    p.add_argument("--commit", default="")
    a = p.parse_args()
    if a.simulated:
        simulated.install()
        a.check = a.replay = 0
    begin, found = time.perf_counter(), {}
    a.out.mkdir(parents=True, exist_ok=True)

    def note(name, value):
        found[name] = value
        print(f"{time.perf_counter() - begin:6.1f} s  {name}: {str(value)[:160]}", flush=True)
        text = json.dumps(origin(a.model, a.commit) | found, indent=1)
        (a.out / "server_gpu.json").write_text(text + "\n")

    each, rng = [int(n) for n in a.streams.split(",") if n], random.Random(a.seed)
    note("seed", a.seed)
    pages = -(-(a.prompt + max(a.answer, 2 * DEPTH)) // 64)
    context, most = 64 * max(pages, 10), max(each, default=64)
    cache = most * context
    serve = [sys.executable, str(Path(__file__).parent / "recorded.py"), str(a.out / "passes.json")]
    serve += ["--simulated"] * a.simulated + ["serve", a.model, "--backend", a.backend]
    serve += ["--port", str(a.port), "-c", str(context), "--sequences", str(most)]
    serve += ["--cache", str(cache), "--no-page"]
    engine = EngineConfig(context=context, max_sequences=most, pages=cache // 64)
    with (a.out / "server.log").open("w") as log, Server(serve, a.port, log) as server:
        note("the server is ready after", round(time.perf_counter() - begin, 1))
        ready = (a.out / "server.log").read_text().splitlines()
        note("before it was", next((line for line in ready if "captured" in line), ""))
        with Model(a.model, a.backend, engine) as model:
            note("device", model.backend.device)
            begun = time.perf_counter()
            made = model.backend.prepare()
            note("once more", f"{made}, in {time.perf_counter() - begun:.1f} s")
            wrong = check(a, model, rng, note) if a.check else 0
            rows = measure(a, Bare(model, a.prompt), server, each, note, begin) if each else []
    passes = json.loads((a.out / "passes.json").read_text())[1:]
    kinds = []
    for n in each:
        begun, ended = found[f"{n} streams"]["began, ended"]
        note(f"passes of {n} streams", told([p for p in passes if begun <= p[0] <= ended]))
        for kind, of in found[f"passes of {n} streams"].items():
            kinds.append(f"{n:>4} {kind}: " + ", ".join(f"{k} {v}" for k, v in of.items()))
    print("\n", *kinds, sep="\n")
    if not each:
        raise SystemExit(wrong > 0)
    head = "streams", "first ms p50", "p99", "between ms p50", "p99", "tokens/s"
    print(f"\n{wrong} receipts differ")
    print(" ".join(f"{h:>14}" for h in (*head, "of the device", "step ms", "step / p50")))
    for row in rows:
        print(" ".join(f"{value:>14}" for value in row))
    raise SystemExit(wrong > 0)


def check(a, model, rng, note):
    """How many receipts of requests together are not those of each alone."""
    requests = list(bodies(rng, a.check, model.config.vocab))
    receipts = asyncio.run(together(a.port, requests, rng))
    note("receipts of requests together", len(receipts))
    wrong = sum(not alone(model, receipt) for receipt in receipts)
    note("of these differ from those alone", wrong)
    tokens = sum(len(receipt["tokens"]) for receipt in receipts)
    note("tokens in them, requests that were left", [tokens, sum(left for _, left in requests)])
    if a.replay:
        few = sorted(receipts, key=lambda receipt: len(receipt["prompt"]))[: 4 * a.replay : 4]
        with Model(a.model, "cpu", EngineConfig(context=1024, max_sequences=1)) as cpu:
            told = [replay(Receipt.of(receipt, "answer"), cpu) for receipt in few]
        note("replayed on the CPU, different", [len(told), sum(d is not None for d in told)])
        wrong += sum(d is not None for d in told)
    return wrong


def measure(a, bare, server, each, note, begin):
    """A row of the table for each number of streams."""
    note("ms of a prompt alone", round(1e3 * (prompt := bare.prompts(a.prompt)), 2))
    steps = {}
    for n in each:
        steps[n], ways = bare.steps(n)
        note(f"{n}: ms of a step alone", {parts: round(1e3 * s, 3) for parts, s in ways.items()})
    begun = time.perf_counter()
    asked(a.port, max(each), "--seconds", 3600, "--requests", 4 * max(each))
    note("other requests before, seconds", round(time.perf_counter() - begun, 1))
    least = {n: n * prompt + a.answer * steps[n] for n in each}  # seconds of a request a stream
    rows = []
    for i, n in enumerate(each):
        left = 0.7 * (a.seconds - (time.perf_counter() - begin)) / sum(least[m] for m in each[i:])
        rounds, answer = max(1, min(4, int(left))), a.answer
        if left < 1:
            answer = max(32, int(left * answer))
        processes = min(a.clients, n)
        ask = a.port, n, "--exact", a.prompt, answer, bare.backend.limits.vocabulary
        ask += "--sampled", a.sampled, "--seconds", 3600, "--requests", rounds * n // processes
        _, before = server.memory()
        got = asked(*ask, processes=processes, seed=a.seed + n)
        got["processor seconds of the server"] = round(server.memory()[1] - before, 2)
        requests, between = got["requests"], got["ms between pieces p50, p99"]
        alone = requests * prompt + requests / n * answer * steps[n]
        got["of the device's tokens/s"] = round(alone / got["seconds"], 3)
        got["step alone / median between pieces"] = round(1e3 * steps[n] / between[0], 3)
        got["prompt, answer, rounds"] = [a.prompt, answer, rounds]
        note(f"{n} streams", got)
        rows.append(
            [n, *got["ms to the first piece p50, p99"], *between, got["generated tokens/s"]]
            + [got["of the device's tokens/s"], round(1e3 * steps[n], 3)]
            + [got["step alone / median between pieces"]]
        )
    return rows


if __name__ == "__main__":
    main()
