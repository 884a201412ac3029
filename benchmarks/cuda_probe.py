"""Time the ingredients of the decode step on the GPU: read rate, matrix-vector products, barriers.

usage: python benchmarks/cuda_probe.py OUT.json
"""

import json
import sys
from pathlib import Path

import numpy as np
from cuda.bindings import driver

from isobit.backends.cuda.gpu import CudaGpu

STEM = str(Path(__file__).resolve().with_suffix(""))
SHARED = 688 * 16 + 4 * 4096


def ok(result):
    assert result[0] == driver.CUresult.CUDA_SUCCESS, result
    return result[1] if len(result) == 2 else result[1:]


def timed(gpu, queue, repeats=15):
    """Median milliseconds of a graph made of what ``queue`` launches."""
    stream = gpu._stream.handle
    queue()  # compiles and loads
    gpu.synchronise()
    ok(
        driver.cuStreamBeginCapture(
            stream, driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        )
    )
    queue()
    graph = ok(driver.cuGraphInstantiate(ok(driver.cuStreamEndCapture(stream)), 0))
    a, b = (ok(driver.cuEventCreate(0)) for _ in range(2))
    times = []
    for _ in range(repeats):
        ok(driver.cuEventRecord(a, stream))
        ok(driver.cuGraphLaunch(graph, stream))
        ok(driver.cuEventRecord(b, stream))
        ok(driver.cuEventSynchronize(b))
        times.append(ok(driver.cuEventElapsedTime(a, b)))
    return sorted(times)[repeats // 2]


def main():
    gpu = CudaGpu()
    sms = gpu.multiprocessors
    rng = np.random.default_rng()
    rows = []

    def note(name, value, unit):
        rows.append({"name": name, "value": value, "unit": unit})
        print(f"{name:<58} {value:9.3f} {unit}", flush=True)

    # A pool of random bytes larger than any L2, filled by doubling.
    pool_bytes = 1 << 30
    pool = gpu.allocate(pool_bytes + (1 << 24))
    seed = rng.integers(0, 256, 1 << 26, dtype=np.uint8)
    gpu.upload(pool, seed)
    filled = seed.nbytes
    while filled < pool_bytes:
        ok(driver.cuMemcpyDtoD(pool + filled, pool, min(filled, pool_bytes - filled)))
        filled *= 2
    acts = gpu.allocate(64 * 688)
    gpu.upload(acts, rng.integers(0, 64, 64 * 688, dtype=np.uint8))
    y = gpu.allocate(1 << 22)
    count, cycles = gpu.allocate(256), gpu.allocate(8 * 1024)
    vector = gpu.allocate(1 << 20)

    def launch(kernel, grid, args, block=512, shared=0, **more):
        defines = {"BLOCK": str(block)}
        gpu.launch(STEM, kernel, (grid,), args, shared=shared, defines=defines, **more)

    for block in (256, 512):
        ms = timed(gpu, lambda: launch("read_plain", 8 * sms, (pool, pool_bytes // 16, y), block))
        note(f"plain read of 1 GiB, {block} threads", pool_bytes / ms / 1e6, "GB/s")

    shapes = (  # name, kernel, groups, supers
        ("qkv 5120x2048 Q4_K", "gemv_q4", 640, 8),
        ("attn_out 2048x4096 Q4_K", "gemv_q4", 256, 16),
        ("gate+up 12288x2048 Q4_K", "gemv_q4", 1536, 8),
        ("down as 16384x768 Q4_K", "gemv_q4", 2048, 3),
        ("down as 16384x768 Q6_K", "gemv_q6", 2048, 3),
        ("head 151936x2048 Q6_K", "gemv_q6", 18992, 8),
    )
    for name, kernel, groups, supers in shapes:
        tile = 1152 if kernel == "gemv_q4" else 1680
        nbytes = groups * supers * tile
        n = max(2, min(48, pool_bytes // nbytes))
        floor = None
        for overlap in (False, True):
            ms = timed(
                gpu,
                lambda: [
                    launch(
                        "read_plain", 2 * sms, (pool + i * nbytes, nbytes // 16, y), overlap=overlap
                    )
                    for i in range(n)
                ],
            )
            floor = 1e3 * ms / n
            note(f"{name} ({nbytes / 1e6:.1f} MB): plain read, overlap={overlap}", floor, "us")
            for block, per_sm in ((256, 1), (256, 2), (512, 1)):
                tiles = -(-groups // (sms * per_sm)) * supers
                if tiles * 8 > 4096 or supers > 16:
                    if tiles * 8 > 4096 * 4:
                        continue
                shared = 688 * 16 + 4 * max(4096, tiles * 8)
                ms = timed(
                    gpu,
                    lambda: [
                        launch(
                            kernel,
                            per_sm * sms,
                            (pool + i * nbytes, acts, y, groups, supers),
                            block,
                            shared,
                            overlap=overlap,
                        )
                        for i in range(n)
                    ],
                )
                note(f"  {block} threads x {per_sm}, overlap={overlap}", 1e3 * ms / n, "us")

    for block in (256, 512):
        for overlap in (False, True):
            ms = timed(
                gpu,
                lambda: [launch("nothing", sms, (y,), block, overlap=overlap) for _ in range(300)],
            )
            note(f"empty kernel, {block} threads, overlap={overlap}", 1e3 * ms / 300, "us")

    n = 1000
    for block in (256, 512):
        for kernel, args in (
            ("barriers", (count, n, cycles)),
            ("barriers_by_warp", (count, n, cycles)),
            ("barriers_and_vector", (count, n, vector, 2048, y, cycles)),
            ("tagged_vector", (n, vector, 2048, y, cycles)),
        ):

            def queue(kernel=kernel, args=args, block=block):
                ok(driver.cuMemsetD8Async(count, 0, 256, gpu._stream.handle))
                ok(driver.cuMemsetD8Async(vector, 0, 1 << 20, gpu._stream.handle))
                launch(kernel, sms, args, block, cooperative=True)

            try:
                note(f"{kernel}, {block} threads", timed(gpu, queue, 5), "us each")
            except Exception as error:
                print(kernel, repr(error)[:300])

    for kernel in ("dots_q4_4", "dots_q4_1", "dots_q6_4", "dots_q6_1"):
        for block in (256, 512):
            launch(kernel, sms, (pool, acts, 200, y, cycles), block, SHARED)
            out = np.empty(sms, np.int64)
            gpu.download(cycles, out)
            warps = block // 32
            note(
                f"{kernel}, {warps} warps: cycles a superblock-step of all",
                float(np.median(out)) / 200,
                "cycles",
            )

    Path(sys.argv[1]).write_text(json.dumps({"device": gpu.name, "rows": rows}, indent=1))
    gpu.close()


main()
