"""Stages of cuda_parts.py that measure: rates, timelines of kernels, and a library's exchange."""

import time
from functools import partial

import numpy as np
from parts_models import DEPTH, STEPS, TIMED, Texts, in_parts, opened

from isobit.backends.base import LOGITS
from isobit.backends.cuda import CudaBackend
from isobit.backends.cuda.device.gpu import CudaGpu
from isobit.config import EngineConfig


def rates(a, note):
    """Seconds of each task on one device and on all, in turns."""
    weights = opened(a.model, a.layers)
    engine = EngineConfig(context=4608, max_sequences=32, chunk=2048)
    two = in_parts(a, weights, engine)
    one = CudaBackend(weights, engine, CudaGpu(0))
    both = {"one": one, "split": two}
    vocab, pages = two.limits.vocabulary, two.limits.positions // 64
    rng = np.random.default_rng(5)
    note("devices", two.device)

    def decode(n):
        texts = Texts(rng, vocab, n, 4)
        for s in range(n):
            b = texts.prompt(s, DEPTH)
            for backend in both.values():
                backend.forward(b)
        tokens, at = texts._ids(n), texts.ends
        return n * STEPS, lambda backend: backend.greedy(tokens, at, texts.pages, STEPS)

    def prefill(n):
        b = Texts(rng, vocab, 1, pages).prompt(0, n)
        return n, lambda backend: backend.forward(b)

    def logits(n):
        texts = Texts(rng, vocab, n, 4)
        b = texts.step()
        return n, lambda backend: backend.forward(b)

    tasks = [(f"decode, {n} sequences", decode, n, 7) for n in (1, 8, 32)]
    tasks += [(f"prefill of {n}", prefill, n, 7) for n in (512, 4096)]
    tasks += [("a step with its logits", logits, 1, 15)]
    for name, make, n, rounds in tasks:
        count, work = make(n)
        seconds = {key: [] for key in both}
        for backend in both.values():  # warms up
            work(backend)
        for _ in range(rounds):
            for key, backend in both.items():
                begun = time.perf_counter()
                work(backend)
                seconds[key].append(time.perf_counter() - begun)
        mid = {key: float(np.median(s)) for key, s in seconds.items()}
        ratios = np.array(seconds["one"]) / np.array(seconds["split"])
        note(
            name,
            {f"{key}, tokens/s": round(count / s, 1) for key, s in mid.items()}
            | {"ratio": round(float(np.median(ratios)), 3)}
            | {"from": round(float(ratios.min()), 3), "to": round(float(ratios.max()), 3)},
        )
    b = Texts(rng, vocab, 1, pages).prompt(0, 512)
    begun = time.perf_counter()
    with one._gpu.rehearsal():
        one.compute(b, LOGITS, None, None)
    middle = time.perf_counter()
    two._rehearse([partial(x.compute, b, LOGITS, None, None) for x in two._here])
    ms = {"one": middle - begun, "split": time.perf_counter() - middle}
    note("host's ms of a prefill of 512", {k: round(1e3 * v, 2) for k, v in ms.items()})
    two.close()
    one.close()


def timeline(a, note):
    """Kernels of steps and prompts on one device, and on the first of all, from the driver's
    timeline (needs torch): launches a layer, and what each kernel adds, by what it follows."""
    from cuda_timeline import table, traced  # noqa: PLC0415

    weights = opened(a.model, TIMED)
    engine = EngineConfig(context=2304, max_sequences=32, chunk=2048, pages=256)
    rng = np.random.default_rng(5)
    for key in ("one", "split"):
        if key == "one":
            backend = CudaBackend(weights, engine, CudaGpu(0))
        else:
            backend = in_parts(a, weights, engine)

        def show(name, run, passes, key=key):
            for _ in range(3):
                run()
            kernels = sorted(traced(run), key=lambda k: k[3])
            behind = ["", *(k[0] for k in kernels)]
            named = [(f"{k[0]} < {b}", *k[1:]) for k, b in zip(kernels, behind, strict=False)]
            rows, us = table(sorted(named, key=lambda k: k[4]), passes)
            launches = sum(row["a pass"] for row in rows)
            note(
                f"{key}, {name}",
                {"us a pass": round(us, 1), "launches a layer": round(launches / TIMED, 2)}
                | {"kernels": sorted(rows, key=lambda row: -row["us a pass"])},
            )

        vocab = backend.limits.vocabulary
        for n in (1, 8, 32):
            texts = Texts(rng, vocab, n, 4)
            for s in range(n):
                backend.forward(texts.prompt(s, DEPTH))
            greedy = partial(backend.greedy, texts._ids(n), texts.ends, texts.pages, 8)
            show(f"{n} sequences", greedy, 8)
        for n in (512, 2048):
            prompt = Texts(rng, vocab, 1, 36).prompt(0, n)
            show(f"a prompt of {n}", partial(backend.forward, prompt), 1)
        backend.close()


def nccl(a, note):
    """NCCL's all-gather of what a layer exchanges, of one vector and of prompts (needs torch)."""
    import torch  # noqa: PLC0415
    from torch.cuda import nccl as library  # noqa: PLC0415

    for nbytes in (4 << 10, 64 << 10, 1 << 20, 4 << 20, 8 << 20, 16 << 20, 24 << 20):
        every = range(a.parts)
        mine = [torch.zeros(nbytes // 4, device=f"cuda:{r}") for r in every]
        whole = [torch.zeros(a.parts * nbytes // 4, device=f"cuda:{r}") for r in every]

        def gather(count, mine=mine, whole=whole):
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            for _ in range(count):
                library.all_gather(mine, whole)
            events[1].record()
            for r in range(a.parts):
                torch.cuda.synchronize(r)
            return 1e3 * events[0].elapsed_time(events[1]) / count

        gather(10)
        us = min(gather(20) for _ in range(5))
        note(f"all-gather of {nbytes >> 10} KB a part, us", round(us, 1))
