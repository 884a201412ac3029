"""The stage of cuda_parts.py that looks within the kernels of a step of one sequence."""

import time
from functools import partial
from typing import ClassVar

import numpy as np
from parts_models import DEPTH, STEPS, TIMED, Texts, gpu_count, in_parts, opened

from isobit.backends.cuda import CudaBackend
from isobit.backends.cuda.device.gpu import CudaGpu
from isobit.config import EngineConfig


class Marked(CudaGpu):
    """A device whose fused kernels may be compiled another way, and note when they pass points."""

    more: ClassVar[dict[str, str]] = {}  # definitions besides
    timeline = 0  # where times are noted

    def launch(self, stem, *a, **k):
        if stem.startswith("fusions/decode/"):
            noted = {"TIMELINE": hex(self.timeline) + "ull"} if self.timeline else {}
            k["defines"] = dict(k["defines"]) | self.more | noted
        super().launch(stem, *a, **k)


POINTS = ("start", "waited", "prologue", "products", "experts", "end")
KERNELS = ("qkv", "attn_out", "router", "gate_up", "down", "head", "attention", "merge")
WAYS = {"as it is": {}}


def points(times):
    """When the first, the middle and the last block passed each point, in ns from the first that
    had waited for the layer's input."""
    begin = int(times[1][times[1] > 0].min())
    rows = {}
    for k, row in enumerate(times):
        t = np.sort(row[row > 0].astype(np.int64)) - begin
        if t.size:
            name = f"{KERNELS[k // 10]} {POINTS[k % 10]}"
            rows[name] = [int(t[0]), int(t[len(t) // 2]), int(t[-1]), int(t.size)]
    return dict(sorted(rows.items(), key=lambda kv: kv[1][1]))


def guessed(gpu, decoder, config):
    """Of the experts that the last step chose, the part that was predicted."""
    n, k = config.n_experts, config.n_experts_used
    slots = [s for s in decoder._g.slots if s.name in ("prediction", "chosen")]
    found = {"prediction": [], "chosen": []}
    for slot in slots:
        words = np.empty(1 + n if slot.name == "prediction" else k, np.uint64)
        gpu.download(slot.address, words)
        found[slot.name].append(words)
    words, chosen = (np.array(found[name]) for name in found)
    logits = (words[:, 1:] >> np.uint64(32)).astype(np.uint32).view(np.float32)
    first = np.argsort(-logits, axis=1)[:, :k]
    ids = (chosen >> np.uint64(16) & np.uint64(0xFFFF)).astype(int)
    return round(float(np.mean([np.isin(a, b).mean() for a, b in zip(ids, first, strict=True)])), 3)


def marks(a, note):
    """Steps of one sequence, on one device and on all: how long they take the WAYS, and when
    blocks of a layer pass points of its kernels."""
    weights = opened(a.model, TIMED)
    engine = EngineConfig(context=1024, max_sequences=1, chunk=128)
    enough = gpu_count() >= a.parts
    several = [Marked(r if enough else 0) for r in range(a.parts)]
    two = in_parts(a, weights, engine, several)
    alone = Marked(0)
    one = CudaBackend(weights, engine, alone)
    both = {"one": (one, [one], [alone]), "split": (two, two._here, several)}
    texts = Texts(np.random.default_rng(5), weights.config.vocab, 1, 4)
    prompt = texts.prompt(0, DEPTH)
    at = texts._ids(1), texts.ends, texts.pages

    def capture(backends):
        for b in backends:
            b._gpu.activate()
            decoder = b._programs.one
            queue = partial(decoder._queue, decoder._pass(1, many=False))
            b._gpu.compile(queue, lambda *_: None)
            with b._gpu.rehearsal():
                decoder.graphs.made[1, False] = b._gpu.capture(queue)

    def microseconds(backend):
        seconds = []
        for _ in range(7):
            begun = time.perf_counter()
            backend.greedy(*at, STEPS)
            seconds.append(time.perf_counter() - begun)
        return round(1e6 * float(np.median(seconds)) / STEPS, 1)

    expected = None
    for key, (backend, here, gpus) in both.items():
        gpu, first = gpus[0], here[0]
        backend.forward(prompt)
        backend.greedy(*at, 4)
        for name, way in WAYS.items() if key == "split" else [("as it is", {})]:
            for each in gpus:
                each.more, each.timeline = way, 0
            capture(here)
            tokens = backend.greedy(*at, STEPS)
            expected = tokens if expected is None else expected
            found = {"us a step": microseconds(backend), "tokens": tokens[:6].ravel().tolist()}
            found["tokens that differ"] = int(np.count_nonzero(tokens != expected))
            gpu.activate()
            found["guessed"] = guessed(gpu, first._programs.one, weights.config)
            with gpu.rehearsal():
                gpu.timeline = buffer = gpu.allocate(1 << 20)
            capture(here[:1])
            backend.greedy(*at, 4)
            gpu.activate()
            gpu.upload(buffer, np.zeros(80 * 256, np.uint64))
            backend.greedy(*at, 1)
            times = np.empty((80, 256), np.uint64)
            gpu.activate()
            gpu.download(buffer, times)
            gpu.timeline = 0
            found["ns: first, median, last, blocks"] = points(times)
            note(f"{key}: {name}", found)
            note("wrong", note.found.get("wrong", 0) + found["tokens that differ"])
    two.close()
    one.close()
