"""What users get of the CUDA backend's speed: bits first, then ways to generate in turns.

usage: python benchmarks/cuda_users.py MODEL.gguf OUT [--tokens 96] [--rounds 5] [--streams 1,4,16]
                                       [--seconds 150]

The bare step is ``Backend.greedy``, which waits for nothing; the others go through the engine, as
generations do: the most likely token, sampled ones, with penalties, biases or a grammar,
log-probabilities, a receipt, each with its ratio to the bare step. Bits: every way gives the
tokens, log-probabilities and digests that it gives from logits brought to the host.
OUT/cuda_users.json gets every figure; the table comes last. A model without a tokenizer, or a
machine without llguidance, has no grammars: those ways are named as not run.
"""

import argparse
import json
import re
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
from batches import batch, origin
from kernels import asked, compile_all

from isobit.backends.base.draws import ADJUSTED
from isobit.backends.base.row_results import RowRequest
from isobit.backends.cuda.device.gpu import CudaGpu
from isobit.backends.cuda.sampler import RowDraws
from isobit.config import EngineConfig
from isobit.errors import BackendUnavailable, ModelRefused
from isobit.model.checkpoint import open_model
from isobit.model.weights import Weights
from isobit.runtime.grammar import Grammar
from isobit.runtime.model import Model
from isobit.runtime.sampler import BatchSampler, Sampler, Sampling
from isobit.verify.receipt import Recorder

PROMPT = 32
MILD = Sampling(temperature=0.7, top_p=0.9, top_k=40, seed=1)
PENALTIES = Sampling(1.0, 0, 1.0, 0.0, 1.1, 1, presence_penalty=0.3, frequency_penalty=0.2)
BIAS = Sampling(1.0, seed=1, logit_bias=tuple((id, id % 7 - 3.0) for id in range(300)))
LINES = r"start: /([a-z]{3,9} [0-9]{1,4}\n){300}/"
HELD = Sampling(1.0, seed=1, grammar=Grammar(LINES))
EVERYTHING = replace(
    MILD,
    repeat_penalty=1.1,
    presence_penalty=0.3,
    frequency_penalty=0.2,
    logit_bias=BIAS.logit_bias,
    grammar=HELD.grammar,
)
WAYS = {  # settings, log-probabilities, whether a receipt is made, whether steps go ahead
    "most likely": (Sampling(), None, False, True),
    "most likely, nothing ahead": (Sampling(), None, False, False),
    "temperature 1": (Sampling(temperature=1.0, seed=1), None, False, True),
    "temperature 1, nothing ahead": (Sampling(temperature=1.0, seed=1), None, False, False),
    "0.7, top_p, top_k": (MILD, None, False, True),
    "min_p": (Sampling(temperature=1.0, min_p=0.05, seed=1), None, False, True),
    "5 log-probabilities": (Sampling(), 5, False, True),
    "sampled, 5 log-probabilities": (MILD, 5, False, True),
    "receipt": (Sampling(), None, True, True),
    "receipt, nothing ahead": (Sampling(), None, True, False),
    "sampled, receipt": (MILD, None, True, True),
    "penalties": (PENALTIES, None, False, True),
    "penalties, nothing ahead": (PENALTIES, None, False, False),
    "300 biases": (BIAS, None, False, True),
    "grammar": (HELD, None, False, True),
    "grammar, nothing ahead": (HELD, None, False, False),
    "all of them, top_p, top_k": (EVERYTHING, None, False, True),
    "all of them, receipt": (EVERYTHING, None, True, True),
}


def constraint_of(model, sampling):
    """What a generation is held to; raises ModelRefused or BackendUnavailable if that cannot be."""
    return sampling.grammar and model.grammars.constraint(sampling.grammar)


def generate(model, prompts, count, way):
    """Generations together; (microseconds a token of one, what they gave)."""
    sampling, logprobs, receipt, ahead = WAYS[way]
    engine, begun = model.generations, []
    model.backend.goes_ahead = ahead
    for prompt in prompts:
        recorder = Recorder() if receipt else None
        more = {"logprobs": logprobs, "watch": recorder, "salt": None, "ends": frozenset()}
        more["constraint"] = constraint_of(model, sampling)
        begun.append((engine.submit(prompt, count, sampling, **more), recorder))
    while not all(generation.ready or generation.ended for generation, _ in begun):
        engine.step()
    start = time.perf_counter()
    while not all(generation.ended for generation, _ in begun):
        engine.step()
    seconds = time.perf_counter() - start
    found = []
    for generation, recorder in begun:
        logits = [t.logits for t in recorder.receipt().tokens] if recorder else []
        found.append((list(generation), logits))
    return 1e6 * seconds / (count - 1), found


def on_the_host(model, *args):
    """The same, from logits brought to the host."""
    of, RowRequest.of = RowRequest.of, staticmethod(lambda *_: None)
    try:
        return generate(model, *args)
    finally:
        RowRequest.of = of


def possible(model):
    """Ways that this machine can go with this model, and why not the others."""
    try:
        constraint_of(model, HELD)
    except (ModelRefused, BackendUnavailable) as error:
        held = [way for way, (sampling, *_) in WAYS.items() if sampling.grammar]
        return [way for way in WAYS if way not in held], [f"{way} ({error})" for way in held]
    return list(WAYS), []


def check(model, ways, rng, note):
    """How many generations differ from those of logits on the host, of how many."""
    wrong = total = 0
    for way in ways:
        for n in (1, 3):
            prompts = rng.integers(0, model.config.vocab, (n, 5)).tolist()
            _, ours = generate(model, prompts, 12, way)
            _, theirs = on_the_host(model, prompts, 12, way)
            total, wrong = total + 1, wrong + (ours != theirs)
            if ours != theirs:
                note(f"{way}, {n} together: other than from logits on the host", [ours, theirs])
    return wrong, total


def device_times(model, ways, note):
    """Microseconds that the device takes for what is asked of rows of logits, beside a step."""
    programs, gpu = model.backend._programs, model.backend._gpu
    sampler, vocabulary = programs.sampler, model.graph.logits.shape.width
    logits = programs.one.logits
    kinds = {
        "most likely and a log-probability": (RowRequest(top=1), None),
        "5 log-probabilities": (RowRequest(top=5), None),
        "20 log-probabilities": (RowRequest(top=20), None),
        "digest": (RowRequest(digest=True), None),
    }
    for name in ("temperature 1", "0.7, top_p, top_k", "min_p", "penalties", "300 biases"):
        kinds[name] = RowRequest(drawn=True), WAYS[name][0]
    for name in {"grammar", "all of them, top_p, top_k"} & set(ways):
        kinds[name] = RowRequest(drawn=True), WAYS[name][0]
    for name, (what, sampling) in kinds.items():
        draws = None
        if sampling is not None:
            held = constraint_of(model, sampling)
            one = Sampler(sampling, range(1000), constraint=held)
            draws = BatchSampler([one], vocabulary).draws(np.zeros(1, np.int32))
        placed = RowDraws.of(draws, np.zeros(1, np.int32))

        def queue(what=what, placed=placed):
            sampler.queue(logits, 1, what, placed)

        queue()
        gpu.synchronise()
        with (  # it is all there now; copies from memory that is not locked cannot be captured
            patch.object(gpu, "upload", lambda *_: None),
            patch.object(sampler, "_stage", lambda nbytes: np.empty(nbytes, np.uint8)),
            patch.object(sampler, "_tell", lambda *_: None),
        ):
            graph = gpu.capture(queue)
        note(f"device: {name}", per_call(gpu, partial(gpu.replay, graph)), "us a row")
    several = sampler._stage(16_000 * ADJUSTED.itemsize)
    copy = partial(gpu.upload, sampler._at(sampler._edits), several)
    note("device: 16,000 ids told", per_call(gpu, copy), "us")


def per_call(gpu, queue):
    """Microseconds of what is queued, often."""
    times = []
    for _ in range(7):
        gpu.synchronise()
        start = time.perf_counter()
        for _ in range(50):
            queue()
        gpu.synchronise()
        times.append(1e6 * (time.perf_counter() - start) / 50)
    return float(np.median(times))


def main():
    p = argparse.ArgumentParser()
    p.add_argument("model")
    p.add_argument("out")
    p.add_argument("--commit", default="")
    p.add_argument("--tokens", type=int, default=96)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--streams", default="1,4,16")
    p.add_argument("--seconds", type=float, default=150)
    p.add_argument("--only", default="", help="a regular expression of the ways that are timed")
    a = p.parse_args()
    begin, found, table = time.perf_counter(), {}, []
    Path(a.out).mkdir(parents=True, exist_ok=True)

    def note(name, value, unit=""):
        found[name] = value
        print(f"{time.perf_counter() - begin:6.1f} s  {name}: {str(value)[:90]} {unit}", flush=True)
        text = json.dumps(origin(a.model, a.commit) | found, indent=1, default=str)
        (Path(a.out) / "cuda_users.json").write_text(text + "\n")

    streams = [int(n) for n in a.streams.split(",")]
    engine = EngineConfig(context=512, max_sequences=max(*streams, 4), chunk=512)
    rng = np.random.default_rng()
    weights, gpu = Weights.from_file(open_model(Path(a.model))), CudaGpu()
    note("bytes of kernels compiled", compile_all(asked(weights, engine, gpu), gpu.arch))
    gpu.close()
    with Model(a.model, "cuda", engine) as model:
        note("device", model.backend.device)
        possible_ways, left = possible(model)
        wrong, total = check(model, possible_ways, rng, note)
        note("generations that differ from those of logits on the host", [wrong, total])
        device_times(model, possible_ways, note)
        for n in streams:
            prompts = rng.integers(0, model.config.vocab, (n, PROMPT)).tolist()
            tokens, at = np.ones(n, np.int32), np.full(n, PROMPT, np.int32)
            pages = np.arange(8 * n, dtype=np.int32).reshape(n, 8)

            def bare(n=n, tokens=tokens, at=at, pages=pages, prompts=prompts):
                for row in range(n):
                    model.backend.forward(batch(prompts[row], 0, pages[row : row + 1]))
                start = time.perf_counter()
                model.backend.greedy(tokens, at, pages, a.tokens)
                return 1e6 * (time.perf_counter() - start) / a.tokens, None

            ways = {"bare": bare}
            for way in filter(re.compile(a.only).search, possible_ways):
                ways[way] = partial(generate, model, prompts, a.tokens, way)
            for way in {"temperature 1", "penalties", "grammar"} & set(ways):
                brought = partial(on_the_host, model, prompts, a.tokens, way)
                ways[f"{way}, logits to the host"] = brought
            times = {way: [] for way in ways}
            for i in range(a.rounds + 1):
                if time.perf_counter() - begin > a.seconds:
                    left.append(f"{n} streams, round {i}")
                    break
                for way, run in ways.items():
                    us, _ = run()
                    if i:  # the first warms up
                        times[way].append(us)
            for way, us in times.items():
                if us:
                    ratio = float(np.median(np.array(times["bare"]) / np.array(us)))
                    table.append((n, way, float(np.median(us)), ratio))
                    note(f"{n} streams: {way}", {"us": us, "of bare": ratio})
    print(f"\n{wrong} of {total} generations differ from those of logits on the host")
    for n, way, us, ratio in table:
        print(f"{n:3d} streams  {way:<36} {us:9.0f} us a step  {ratio:6.1%} of the bare speed")
    if left:
        print("not run:", ", ".join(left))
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    main()
