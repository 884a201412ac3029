"""Time how blocks of a decode step may hand one another a few KB while weights stream (H100, H200).

usage: python benchmarks/cuda_exchange.py OUT.json [--compile-only]

Every variant's words are checked before it is timed, and after each timed run. A variant that gave
a wrong word, or waited too long for one, has no time.
"""

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_int32, c_int64, c_uint64
from pathlib import Path

import numpy as np
from cuda.bindings import driver
from cuda_graphs import ok

from isobit.backends.cuda.device.compile import cubin
from isobit.backends.cuda.device.gpu import CudaGpu
from isobit.backends.cuda.device.launch import launch_config

STEM = str(Path(__file__).resolve().with_suffix(""))
BLOCKS, THREADS, SEED = 128, 512, 12345
METHODS = ("PLAIN", "TAG8", "TAG16", "UNLIKE", "FLAGS", "COUNTER", "RELAY", "ALONE")
METHODS += ("BARRIER", "PULL", "ASYNC")
PIECE, PIECES = 8192, 8
ROUNDS, LINKS = 2000, 250
GRID, LINK, TRAFFIC = 120 << 10, 78 << 10, 200 + PIECE * PIECES + 256
"""Shared memory: so that one block of ``rounds``, or two of ``link``, fit beside one of traffic."""

LOADS = {"none": None, "1.5": 1.5, "2.5": 2.5, "3.5": 3.5, "most": 0}
"""Traffic beside what is measured, TB/s asked for; 0: as much as comes."""


def expected(words, rounds):
    """The sum of the last round."""
    i = np.arange(words, dtype=np.uint32)
    factor, spread = 2 * i + 1, i * np.uint32(0x9E3779B9)
    total = np.uint32(SEED)
    for _ in range(rounds):
        x = (total + spread) * np.uint32(0x85EBCA6B)
        x = (x ^ x >> np.uint32(15)) * np.uint32(0xC2B2AE35)
        x = (x ^ x >> np.uint32(13)) & np.uint32(0x7FFFFFFF)
        total = (x * factor).sum(dtype=np.uint32)
    return int(total)


def variants():
    """(name, kernel, definitions, loads of traffic)."""
    every, idle = tuple(LOADS), ("none",)

    def one(name, kernel, method, words=2048, cluster=1, within=0, own=0, loads=every):
        defines = {"METHOD": method, "WORDS": words, "CLUSTER": cluster, "WITHIN": within}
        return name, kernel, {k: str(v) for k, v in (defines | {"OWN": own}).items()}, loads

    out = [one(f"alone, {n} words", "rounds", "ALONE", n) for n in (768, 2048)]
    out += [
        one("kernels one after another", "serial", "PLAIN"),
        one("kernels overlapping (PDL)", "link", "PLAIN"),
        one("kernels overlapping, clusters of 8", "link", "PLAIN", cluster=8),
        one("kernels overlapping, clusters of 16", "link", "PLAIN", cluster=16),
    ]
    for method in ("TAG8", "TAG16", "UNLIKE", "FLAGS"):
        out += [one(f"kernels overlapping, {method}", "link", method)]
    for method in ("TAG8", "TAG16", "UNLIKE", "FLAGS", "COUNTER"):
        out += [one(f"one kernel, {method}", "rounds", method)]
    out += [one(f"one kernel, RELAY by {n}", "rounds", "RELAY", cluster=n) for n in (4, 8, 16)]
    for method in ("TAG8", "UNLIKE"):
        out += [one(f"one kernel, {method}, 6144 words", "rounds", method, 6144)]
    out += [one("kernels overlapping, 6144 words", "link", "PLAIN", 6144)]
    for n in (8, 16):
        for method in ("BARRIER", "PULL", "ASYNC"):
            for words in (768, 2048):
                name = f"cluster of {n}, {method}, {words} words"
                out += [one(name, "rounds", method, words, n, within=1)]
    for own in (16 << 10, 43 << 10, 64 << 10):
        for kernel, method, what in (
            ("rounds", "ALONE", "alone"),
            ("link", "PLAIN", "kernels overlapping"),
            ("link", "TAG8", "kernels overlapping, TAG8"),
            ("link", "UNLIKE", "kernels overlapping, UNLIKE"),
            ("rounds", "TAG8", "one kernel, TAG8"),
            ("rounds", "UNLIKE", "one kernel, UNLIKE"),
        ):
            name = f"{what}, own weights {own >> 10} KB"
            out += [one(name, kernel, method, own=own, loads=idle)]
    return out


class Bench:
    """The device, its buffers, and runs of variants."""

    def __init__(self):
        self.gpu = CudaGpu()
        gpu, kind = self.gpu, driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        self.stream, self.beside, self.aside = (ok(driver.cuStreamCreate(kind)) for _ in range(3))
        self.weight_bytes = 2 << 30
        self.weights = gpu.allocate(self.weight_bytes)
        some = np.random.default_rng().integers(0, 256, 1 << 26, dtype=np.uint8)
        gpu.upload(self.weights, some)
        gpu.synchronise()
        for at in range(some.nbytes, self.weight_bytes, some.nbytes):
            ok(driver.cuMemcpyDtoD(self.weights + at, self.weights, some.nbytes))
        names = ("words", "flags", "base", "sums", "failed", "stop", "moved", "took")
        self.b = {name: gpu.allocate(1 << 20) for name in names}
        self.base, self.kernels, self.sums, self.clusters = 1, {}, {}, {}
        self.ghz = ok(
            driver.cuDeviceGetAttribute(
                driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_CLOCK_RATE, gpu._device
            )
        ) / 1e6  # fmt: skip

    def kernel(self, name, defines, shared):
        key = (name, shared, *sorted(defines.items()))
        if key not in self.kernels:
            code = cubin(STEM, self.gpu.arch, defines)
            loaded = ok(driver.cuLibraryLoadData(code, [], [], 0, [], [], 0))
            kernel = ok(driver.cuLibraryGetKernel(loaded, name.encode()))
            kinds = driver.CUfunction_attribute
            for kind, value in (
                (kinds.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared),
                (kinds.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100),
                (kinds.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1),
            ):
                ok(driver.cuKernelSetAttribute(kind, value, kernel, self.gpu._device) + (0,))
            self.kernels[key] = driver.CUfunction(int(kernel))
        return self.kernels[key]

    def launch(self, stream, kernel, grid, block, shared, values, overlap=False):
        config = launch_config(driver, stream, (grid,), block, shared, overlap=overlap)
        each = tuple(v.value for v in values), tuple(type(v) for v in values)
        ok(driver.cuLaunchKernelEx(config, kernel, each, 0) + (0,))

    def fill(self, name, values):
        ok(driver.cuMemcpyHtoD(self.b[name], values.ctypes.data, values.nbytes) + (0,))

    def read(self, name, count, kind):
        out = np.empty(count, kind)
        ok(driver.cuMemcpyDtoH(out.ctypes.data, self.b[name], out.nbytes) + (0,))
        return out

    def arguments(self, *last):
        p = {name: c_uint64(address) for name, address in self.b.items()}
        return (
            (p["words"], p["flags"], p["base"], c_uint64(self.weights), c_int64(self.weight_bytes))
            + tuple(c_int32(v) for v in last)
            + (p["sums"], p["failed"])
        )

    def queue(self, name, defines):
        """A graph of the variant's rounds, and their number."""
        own, words = int(defines["OWN"]), int(defines["WORDS"])
        before = 512 + 8 * words
        if name == "rounds":
            shared = max(GRID, before + 2 * own)
            kernel = self.kernel(name, defines, shared)
            self.fits(kernel, int(defines["CLUSTER"]), shared, int(defines["WITHIN"]))
            return lambda: self.launch(
                self.stream, kernel, BLOCKS, THREADS, shared, self.arguments(ROUNDS)
            ), ROUNDS
        shared = max(LINK, before + own)
        kernel = self.kernel("link", defines, shared)

        def queue():
            for r in range(LINKS):
                overlap = r > 0 and name == "link"
                values = self.arguments(r, int(r == LINKS - 1))
                self.launch(self.stream, kernel, BLOCKS, THREADS, shared, values, overlap)

        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        ok(driver.cuStreamBeginCapture(self.stream, mode) + (0,))
        queue()
        graph = ok(driver.cuGraphInstantiate(ok(driver.cuStreamEndCapture(self.stream)), 0))
        return lambda: ok(driver.cuGraphLaunch(graph, self.stream) + (0,)), LINKS

    def fits(self, kernel, cluster, shared, within):
        """Whether all blocks run at once, where they wait for one another."""
        if cluster == 1:
            return
        config, size = driver.CUlaunchConfig(), driver.CUlaunchAttribute()
        size.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        size.value.clusterDim.x, size.value.clusterDim.y, size.value.clusterDim.z = cluster, 1, 1
        config.gridDimX, config.gridDimY, config.gridDimZ = BLOCKS, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = THREADS, 1, 1
        config.sharedMemBytes, config.numAttrs, config.attrs = shared, 1, [size]
        function = ok(driver.cuKernelGetFunction(driver.CUkernel(int(kernel))))
        self.clusters[cluster] = int(ok(driver.cuOccupancyMaxActiveClusters(function, config)))
        if not within and self.clusters[cluster] * cluster < BLOCKS:
            raise RuntimeError(f"only {self.clusters[cluster]} clusters of {cluster} run at once")

    def run(self, load, queued, first, rounds, words):
        """Microseconds a round, traffic in TB/s; None for the time if a word was wrong."""
        zero = np.zeros(256, np.uint32)
        for name in ("failed", "flags", "stop", "moved", "took", "sums"):
            self.fill(name, zero)
        self.fill("base", np.array([self.base], np.uint32))
        self.base += rounds + 8
        first()
        ok(driver.cuStreamSynchronize(self.stream) + (0,))
        a, b = (ok(driver.cuEventCreate(0)) for _ in range(2))
        sms = self.gpu.multiprocessors
        asked = LOADS[load]
        if asked is not None:
            clocks = int(PIECE * sms * self.ghz / (1e3 * asked)) if asked else 0
            traffic = self.kernel("traffic", self.any_defines, TRAFFIC)
            values = (c_uint64(self.weights), c_int64(self.weight_bytes), c_int32(clocks))
            values += (c_int32(200_000_000),)
            values += tuple(c_uint64(self.b[n]) for n in ("stop", "moved", "took"))
            self.launch(self.beside, traffic, sms, 64, TRAFFIC, values)
            time.sleep(0.001)
        ok(driver.cuEventRecord(a, self.stream) + (0,))
        queued()
        ok(driver.cuEventRecord(b, self.stream) + (0,))
        ok(driver.cuEventSynchronize(b) + (0,))
        us = 1e3 * ok(driver.cuEventElapsedTime(a, b)) / rounds
        one = np.ones(1, np.uint32)
        ok(driver.cuMemcpyHtoDAsync(self.b["stop"], one.ctypes.data, 4, self.aside) + (0,))
        ok(driver.cuStreamSynchronize(self.beside) + (0,))
        ok(driver.cuStreamSynchronize(self.aside) + (0,))
        rate = 0.0
        if asked is not None:
            moved, took = self.read("moved", sms, np.uint64), self.read("took", sms, np.uint64)
            rate = float(moved.sum() / took.mean() / 1e3)
            assert took.max() < 190_000_000, "the traffic ended before what it was to run beside"
        if (words, rounds) not in self.sums:
            self.sums[words, rounds] = expected(words, rounds)
        right = (self.read("sums", BLOCKS, np.uint32) == self.sums[words, rounds]).all()
        waited = self.read("failed", 1, np.int32)[0]
        return (us if right and not waited else None), rate, bool(waited)

    def measure(self, name, kernel, defines, loads):
        words, cluster = int(defines["WORDS"]), int(defines["CLUSTER"])
        self.any_defines = defines
        queued, rounds = self.queue(kernel, defines)
        begin = self.kernel("first", defines, 48 << 10)
        values = tuple(c_uint64(self.b[n]) for n in ("words", "flags", "base"))

        def first():
            self.launch(self.stream, begin, BLOCKS, THREADS, 48 << 10, values)

        row = {"name": name, "kernel": kernel, "cluster": cluster, "defines": defines}
        self.run("none", queued, first, rounds, words)  # warms up
        for load in loads:
            runs = []
            while len(runs) < 5 and (not runs or runs[-1][0] is not None):
                runs.append(self.run(load, queued, first, rounds, words))
            times = [us for us, _, _ in runs]
            wrong = sum(us is None for us in times)
            row[load] = {
                "us": None if wrong else float(np.median(times)),
                "all us": times,
                "wrong runs": wrong,
                "waited too long": sum(waited for _, _, waited in runs),
                "traffic TB/s": float(np.median([rate for _, rate, _ in runs])),
            }
        return row


def show(row):
    cells = []
    for load in LOADS:
        if load not in row:
            cells.append("")
        elif row[load]["us"] is None:
            cells.append(f"wrong {row[load]['wrong runs']}/{row[load]['waited too long']}")
        else:
            cells.append(f"{row[load]['us']:.2f} ({row[load]['traffic TB/s']:.1f})")
    return f"{row['name']:<52}" + "".join(f"{c:>13}" for c in cells)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("out")
    p.add_argument("--compile-only", action="store_true")
    a = p.parse_args()
    rows = []
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda v: cubin(STEM, "sm_90", v[2]), variants()))
    if a.compile_only:
        print("compiled", len(variants()), "variants for sm_90; nothing was run")
        return
    bench, start = Bench(), time.perf_counter()
    for variant in variants():
        try:
            rows.append(bench.measure(*variant))
            print(show(rows[-1]), f"{time.perf_counter() - start:.0f} s", flush=True)
        except Exception as error:  # a failed variant must not hide the others
            print(variant[0], "not run:", str(error).splitlines()[0], flush=True)
            rows.append({"name": variant[0], "not run": str(error)})
        about = {"device": bench.gpu.name, "multiprocessors": bench.gpu.multiprocessors}
        about |= {"clock GHz": bench.ghz, "clusters at once": bench.clusters}
        Path(a.out).write_text(json.dumps(about | {"rows": rows}, indent=1))
    print("\nclusters at once, by size:", bench.clusters)
    print("us a round (traffic in TB/s)" + " " * 24 + "".join(f"{x:>13}" for x in LOADS))
    for row in rows:
        if "not run" not in row:
            print(show(row))


main()
