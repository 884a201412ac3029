"""The wgpu backend on one model: the driver's self-test, bits, speed, and where a step's time goes.

usage: python benchmarks/wgpu_speed.py MODEL.gguf OUT.json [--context 512] [--budget 90]

Logits of a prompt and of a few decode steps are compared with the CPU backend's before anything is
timed. A part that fails is noted and the next one runs; OUT is written after each.
"""

import argparse
import json
import statistics
import time
import traceback
from pathlib import Path

import numpy as np
from batches import batch, origin

from isobit.backends.cpu import CpuBackend
from isobit.backends.wgpu import WgpuBackend
from isobit.backends.wgpu.device import driver
from isobit.backends.wgpu.device import gpu as device
from isobit.backends.wgpu.device.gpu import Step
from isobit.backends.wgpu.lowering import Pass
from isobit.backends.wgpu.ops import matmul as products
from isobit.config import EngineConfig
from isobit.gguf.reader import GGUFFile
from isobit.model.weights import Weights
from isobit.numerics import KV_PAGE

START = time.perf_counter()
SUMMARY = ("device", "primitives that differ", "logits that differ", "decode", "prefill", "load")
STEPS = 64
DEPTH = 128
PROMPT = 128
REPEATS = 8  # commands queued for one timing

PROBES = {
    "nothing": "@compute @workgroup_size(256) fn probe(@builtin(global_invocation_id) i: vec3<u32>)"
    " { if (p.x == 7u + ONE) { y[i.x] = x[i.x].x; } }",
    "read": "@compute @workgroup_size(256) fn probe(@builtin(global_invocation_id) i: vec3<u32>,"
    " @builtin(num_workgroups) n: vec3<u32>) { var s = vec4(0u); let step = 256u * n.x;"
    " for (var k = i.x; k + 3u * step < arrayLength(&x); k += 4u * step)"
    " { s += x[k] ^ x[k + step] ^ x[k + 2u * step] ^ x[k + 3u * step]; }"
    " if (s.x + s.y + s.z + s.w == 7u) { y[0] = 1u; } }",
    "dots": "@compute @workgroup_size(256) fn probe(@builtin(global_invocation_id) i: vec3<u32>)"
    " { var a = x[i.x & 63u]; for (var k = 0u; k < 256u; k++) {"
    " a = vec4(u32(dot4(a.x, a.y)), u32(dot4(a.y, a.z)), u32(dot4(a.z, a.w)), u32(dot4(a.w, a.x)));"
    " } if (a.x + a.y + a.z + a.w == 7u) { y[0] = 1u; } }",
}
HEAD = """override ONE: u32 = 0u;
@group(0) @binding(0) var<uniform> opaque: vec4<u32>;
@group(0) @binding(1) var<uniform> p: vec4<u32>;
@group(0) @binding(2) var<storage, read> x: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read_write> y: array<u32>;
"""


class Report:
    """What was found, on the screen and in a file."""

    def __init__(self, out, budget, **found):
        self.out, self.budget, self.found = Path(out), budget, found

    def note(self, name, value, unit=""):
        self.found[name] = value
        shown = f"{value:12.2f}" if isinstance(value, float) else f"{value!s:>12}"
        print(f"{name:<52} {shown} {unit}", flush=True)

    def part(self, run):
        """Run a part; what goes wrong in it is noted."""
        name = run.__name__
        begin = time.perf_counter()
        if begin - START > self.budget and name != "summary":
            self.found.setdefault("not run", []).append(name)
            print(f"{name}: not run, {self.budget:.0f} seconds are over")
            return
        try:
            run()
        except Exception as error:
            self.found.setdefault("errors", {})[name] = traceback.format_exc()
            print(f"{name}: FAILED: {type(error).__name__}: {str(error)[:600]}", flush=True)
        self.found[f"{name} seconds"] = round(time.perf_counter() - begin, 2)
        self.out.write_text(json.dumps(self.found, indent=1) + "\n")


def weight_bytes(step):
    """Bytes of weights that a product's dispatch reads; 0 for other kernels."""
    name, p = step.kernel.name.removeprefix("ops/"), step.parameters
    if name.startswith("matmul_floats"):
        rows, first, last = p[1:4]
        return step.buffers[0].size // (last - first) * rows * step.groups[1]
    if name.startswith("matmul"):
        groups, first, last = p[2:5]
        here = min(groups, last - first)
        return step.buffers[0].size // (last - first) * here * step.groups[1]
    return 0


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("model")
    ap.add_argument("out")
    ap.add_argument("--context", type=int, default=512)
    ap.add_argument("--budget", type=float, default=90, help="seconds; no part begins later")
    ap.add_argument("--commit", default="")
    ap.add_argument("--no-cpu", action="store_true", help="compare no bits")
    a = ap.parse_args()
    engine = EngineConfig(context=a.context, max_sequences=1)
    weights = Weights.from_file(GGUFFile.open(a.model))
    c = weights.config
    pages = np.arange(-(-a.context // KV_PAGE), dtype=np.int32)[None]
    rng = np.random.default_rng()
    tokens = rng.integers(0, c.vocab, 256).tolist()
    report = Report(a.out, a.budget, **origin(a.model, a.commit), layers=c.n_layers)
    note = report.note
    state = {}

    def self_test():
        d = device.open_device()
        note("device", d.name)
        note("dot product", d.dot)
        note("largest binding, MiB", d.binding_bytes >> 20)
        failing = driver.failures(d)
        note("primitives that differ", len(failing))
        for name, how in failing.items():
            print(f"  {name}: {how}")
        d.close()

    def load():
        start = time.perf_counter()
        state["gpu"] = gpu = WgpuBackend(weights, engine)
        state["nothing"] = gpu._device.empty(16)
        gpu.forward(batch(tokens[:1], 0, pages, [0]))
        note("load", time.perf_counter() - start, "s, with the first step")

    def bits():
        cpu = CpuBackend(weights, engine)
        differing = total = 0
        parts = [(tokens[:8], 0), *(([tokens[8 + i]], 8 + i) for i in range(4))]
        for some, start in parts:
            work = batch(some, start, pages, range(len(some)))
            ours, theirs = (b.forward(work).view(np.uint32) for b in (state["gpu"], cpu))
            differing, total = differing + int((ours != theirs).sum()), total + ours.size
        cpu.close()
        note("logits compared with the CPU's", total)
        note("logits that differ", differing)

    def decode():
        gpu = state["gpu"]
        gpu.forward(batch(tokens[:DEPTH], 0, pages, [DEPTH - 1]))
        times, token = [], tokens[0]
        for i in range(4 + STEPS):
            start = time.perf_counter()
            logits = gpu.forward(batch([token], DEPTH + i, pages, [0]))
            token = int(logits[0].argmax())
            times.append(time.perf_counter() - start)
        note(f"decode, {STEPS} steps", 1 / statistics.median(times[4:]), "tok/s (median step)")
        note("the same, all of them", STEPS / sum(times[4:]), "tok/s (mean)")

    def prefill():
        gpu, work, times = state["gpu"], batch(tokens[:PROMPT], 0, pages, [PROMPT - 1]), []
        gpu.forward(work)
        for _ in range(5):
            start = time.perf_counter()
            gpu.forward(work)
            times.append(time.perf_counter() - start)
        note(f"prefill of {PROMPT}", PROMPT / statistics.median(times), "tok/s")

    def queued(steps):
        """Seconds of the device for one run of steps, many being queued behind one another."""
        d = state["gpu"]._device
        recording = d.record(steps)
        times = []
        for _ in range(3):
            commands = [d.encode(recording) for _ in range(REPEATS)]
            d.read(state["nothing"], np.uint32)
            start = time.perf_counter()
            for command in commands:
                d.submit(command)
            d.read(state["nothing"], np.uint32)
            times.append((time.perf_counter() - start) / REPEATS)
        return min(times)

    def host():
        """What the host does in a step, part by part."""
        gpu = state["gpu"]
        d, one = gpu._device, Pass(1, 1, DEPTH // KV_PAGE + 1, count=1)
        work = batch(tokens[:1], DEPTH, pages, [0])
        rows = work.logit_rows
        found = {name: [] for name in ("upload", "encode", "submit", "wait", "fetch again")}
        for _ in range(20):
            marks = [time.perf_counter()]
            runs = gpu._runs(work, 0, 1)
            gpu._upload(one, work.tokens, work.positions, work.sequence, pages, rows, runs)
            marks.append(time.perf_counter())
            command = gpu._commands.encode(one, None, traced=False)
            marks.append(time.perf_counter())
            d.submit(command)
            marks.append(time.perf_counter())
            with d.fetching(gpu._staging, 4 * c.vocab) as data:
                data().copy()
            marks.append(time.perf_counter())
            with d.fetching(gpu._staging, 4 * c.vocab) as data:
                data().copy()
            marks.append(time.perf_counter())
            for name, seconds in zip(found, np.diff(marks), strict=True):
                found[name].append(seconds)
        for name, times in found.items():
            note(f"host: {name}", 1e6 * statistics.median(times), "us")

    def probes():
        """What a dispatch costs at least; how fast weights are read; the integer dot product."""
        d = state["gpu"]._device
        y = d.empty(1 << 20)

        def probe(name, x, groups, count):
            d._sources[f"probe_{name}"] = HEAD + PROBES[name]
            kernel = d.kernel((d.dot, f"probe_{name}"), "probe")
            return queued([Step(kernel, (x, y), (0,), (groups,))] * count) / count

        small = d.empty(1 << 16)
        for groups in (1, 132, 1056):
            note(
                f"a dispatch of {groups} empty workgroups",
                1e6 * probe("nothing", small, groups, 600),
                "us",
            )
        # One pipeline behind another, also one that has workgroup memory.
        d._sources["probe_nothing"] = HEAD + PROBES["nothing"]
        shared = "var<workgroup> z: array<vec4<u32>, 592>;\n"
        d._sources["probe_shared"] = (
            HEAD + shared + PROBES["nothing"].replace("= x[", "= z[p.y].x + x[")
        )
        for names in (("nothing", "nothing"), ("nothing", "shared"), ("shared", "shared")):
            two = [
                d.kernel((d.dot, f"probe_{n}"), "probe", **k)
                for n, k in zip(names, ({}, {"ONE": 1}), strict=True)
            ]
            steps = [Step(two[i % 2], (small, y), (0,), (132,)) for i in range(600)]
            note(
                f"dispatches of 132, {' and '.join(names)} by turns",
                1e6 * queued(steps) / 600,
                "us",
            )
        parts = [p for s in state["gpu"]._g.matrices[-1].segments for p in s.parts]
        largest = max((p.buffer for p in parts), key=lambda b: b.size)
        for groups in (264, 1056, 4224):
            seconds = probe("read", largest, groups, 4)
            note(f"plain read, {groups} workgroups", largest.size / seconds / 1e9, "GB/s")
        seconds = probe("dots", small, 4224, 4)
        note("integer dot products", 4224 * 256 * 256 * 4 / seconds / 1e12, "10^12/s")

    def kinds(variant="as it is"):
        """Each kind's dispatches of a whole step, one behind another."""
        gpu = state["gpu"]
        one = Pass(1, 1, DEPTH // KV_PAGE + 1, count=1)
        steps = [s for s in gpu._graph.steps(one, traced=False) if isinstance(s, Step)]
        steps += gpu._graph.head(one)
        by_kind = {}
        for s in steps:
            by_kind.setdefault((s.kernel, s.groups), []).append(s)
        rows, whole = [], queued(steps)
        for (kernel, groups), mine in by_kind.items():
            try:
                seconds = queued(mine)
            except Exception as error:
                print(f"{kernel.name}: {error}")
                continue
            rate = sum(map(weight_bytes, mine)) / seconds / 1e9
            size = "x".join(map(str, groups))
            rows.append((kernel.name, size, len(mine), 1e6 * seconds / len(mine), rate))
        total = sum(count * us for _, _, count, us, _ in rows) / 1e3
        keys = ("kernel", "workgroups", "count", "us", "GB/s")
        report.found.setdefault("kinds", {})[variant] = {
            "step ms": 1e3 * whole,
            "sum of kinds ms": total,
            "each": [dict(zip(keys, r, strict=True)) for r in rows],
        }
        print(f"\n{variant}: a step, queued {1e3 * whole:.3f} ms; sum of its kinds {total:.3f} ms")
        heads = f"{'count':>5} {'us each':>8} {'ms':>7} {'GB/s':>6}"
        print(f"{'kernel':<28} {'workgroups':>12} {heads}")
        for name, size, count, us, rate in rows:
            shown = f"{rate:6.0f}" if rate else "     -"
            ms = count * us / 1e3
            print(f"{name:<28} {size:>12} {count:>5} {us:>8.2f} {ms:>7.3f} {shown}")

    def variants():
        """The same with other numbers of lanes, and without the library's own checks."""
        d = state["gpu"]._device
        usual = products._LANES, products._LANES_A_ROW
        try:
            for products._LANES, products._LANES_A_ROW in ((128, 8), (64, 8), (256, 4)):
                kinds(f"{products._LANES} lanes, {products._LANES_A_ROW} a row")
        finally:
            products._LANES, products._LANES_A_ROW = usual
        from wgpu.backends.wgpu_native import _api  # noqa: PLC0415

        checked = _api.libf.wgpuDeviceCreateShaderModule
        trusted = _api.libf.wgpuDeviceCreateShaderModuleTrusted
        _api.libf.wgpuDeviceCreateShaderModule = lambda device, what: trusted(device, what, 0)
        try:
            d._modules.clear()
            d._kernels.clear()
            kinds("no bounds or loop checks")
        finally:
            _api.libf.wgpuDeviceCreateShaderModule = checked
            d._modules.clear()
            d._kernels.clear()

    def summary():
        for name in SUMMARY:
            found = next((v for n, v in report.found.items() if n.startswith(name)), "not run")
            print(f"{name:<40} {found}")
        for variant, found in report.found.get("kinds", {}).items():
            print(f"step, {variant:<34} {found['step ms']:.3f} ms")

    parts = [
        self_test,
        load,
        bits,
        decode,
        prefill,
        host,
        kinds,
        probes,
        variants,
        summary,
    ]
    for run in parts:
        if run is not bits or not a.no_cpu:
            report.part(run)


main()
