"""What a long prompt costs those that generate as it arrives: time between their tokens.

usage: python benchmarks/prompt_beside.py MODEL.gguf [OUT.json] [--backend cpu] [--prompt 4096]
           [--generating 1,8,32] [--threads 1] [--commit SHA]

So many generations run; then a prompt arrives. The time from one token to the next is that of a
pass, in which all of them get one. It is given for the passes in which the prompt was read, and for
the same passes of the same generations alone, which are then as long: by the wall clock and, on one
thread, by the thread's processor time, which other programs change little.
"""

import argparse
import json
import platform
import time
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

import isobit
from isobit.backends.hardware import processor
from isobit.runtime.sampler import Sampling

BEFORE = 100  # passes until the prompt arrives


def passes(engine, more):
    """Seconds of passes as long as there is more: [n, 2], by the wall and by the processor."""
    found = []
    while more():
        begun = time.perf_counter(), time.thread_time()
        engine.step()
        found.append((time.perf_counter() - begun[0], time.thread_time() - begun[1]))
    return np.array(found)


def measure(model, generating, prompt, rng):
    engine, vocabulary = model.generations, model.config.vocab

    def submit(n, most):  # nothing ends one but its length
        ids = rng.integers(0, vocabulary, n).tolist()
        return engine.submit(ids, most, Sampling(), ends=frozenset(), salt=None)

    def begun():
        running = [submit(16, model.context - 16) for _ in range(generating)]
        while not all(g.request.generated for g in running):
            engine.step()
        left = iter(range(BEFORE))
        passes(engine, lambda: next(left, None) is not None)
        return running

    def end(running):
        for generation in running:
            generation.cancel()

    by_tokens, ran = defaultdict(list), engine.prefill_budget.ran

    def noted(among, tokens, attended, seconds):
        ran(among, tokens, attended, seconds)
        by_tokens[tokens].append(1e3 * seconds)

    running = begun()
    for _ in range(3):  # the engine has seen some before
        before = submit(prompt // 16, 1)
        passes(engine, lambda: not before.ended)
    arrived = submit(prompt, 1)
    engine.prefill_budget.ran = noted
    beside = passes(engine, lambda: not arrived.ended)
    end(running)
    engine.prefill_budget.ran = ran
    running, left = begun(), iter(beside)  # the same positions without it
    alone = passes(engine, lambda: next(left, None) is not None)
    end(running)
    row = {"generating": generating, "passes of the prompt": len(beside)}
    row["passes, ms in the median, by tokens of prompts"] = {
        n: [len(ms), round(float(np.median(ms)), 3)] for n, ms in sorted(by_tokens.items())
    }
    for i, clock in enumerate(("wall", "processor")):
        for name, found in (("alone", alone), ("beside", beside)):
            row[f"{clock}, ms {name}: p50, p99"] = [
                round(1e3 * float(np.percentile(found[:, i], q)), 3) for q in (50, 99)
            ]
        row[f"{clock}, ms beside: mean, p99.9, longest"] = [
            round(1e3 * float(x), 3)
            for x in (
                beside[:, i].mean(),
                np.percentile(beside[:, i], 99.9),
                beside[:, i].max(),
            )
        ]
        row[f"{clock}, mean beside by mean alone"] = round(
            float(beside[:, i].mean() / alone[:, i].mean()), 3
        )
        row[f"{clock}, s until the prompt's token"] = round(float(beside[:, i].sum()), 2)
        ratios = [np.percentile(beside[:, i], q) / np.percentile(alone[:, i], q) for q in (50, 99)]
        row[f"{clock}, ratios of p50, p99"] = [round(float(ratio), 3) for ratio in ratios]
    return row


def main():
    p = argparse.ArgumentParser()
    p.add_argument("model")
    p.add_argument("out", type=Path, nargs="?")
    p.add_argument("--backend", default="cpu")
    p.add_argument("--prompt", type=int, default=4096)
    p.add_argument("--generating", default="1,8,32")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--commit", default="")
    a = p.parse_args()
    each = [int(n) for n in a.generating.split(",")]
    rng, rows = np.random.default_rng(a.seed), []
    with isobit.load(
        a.model,
        backend=a.backend,
        threads=a.threads,
        context=2 * a.prompt,
        cache=(max(each) + 2) * 2 * a.prompt,
        sequences=max(each) + 2,
    ) as model:
        model.backend.prepare()
        for n in each:
            rows.append(measure(model, n, a.prompt, rng))
            print(json.dumps(rows[-1]), flush=True)
        found = {
            "model": Path(model.path).name,
            "commit": a.commit,
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "machine": f"{platform.platform()}, {processor()}",
            "backend": f"{model.backend.name} ({model.backend.device})",
            "prompt": a.prompt,
            "generations": rows,
        }
    if a.out:
        a.out.write_text(json.dumps(found, indent=1) + "\n")


main()
