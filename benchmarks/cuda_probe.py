"""Time the ingredients of the decode step on the GPU: read rate, matrix-vector products, barriers.

usage: python benchmarks/cuda_probe.py OUT.json
"""

import json
import sys
from pathlib import Path

import numpy as np
from cuda.bindings import driver
from cuda_graphs import milliseconds, ok

from isobit.backends.cuda.device.gpu import CudaGpu
from isobit.backends.cuda.device.layout import ACT_BYTES

STEM = str(Path(__file__).resolve().with_suffix(""))


def main():
    gpu = CudaGpu()

    def timed(queue):
        return milliseconds(gpu, gpu.capture(queue))

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
    acts = gpu.allocate(64 * ACT_BYTES)
    gpu.upload(acts, rng.integers(0, 64, 64 * ACT_BYTES, dtype=np.uint8))
    y = gpu.allocate(1 << 22)

    def launch(kernel, grid, args, block=512, shared=0, **more):
        defines = {"BLOCK": str(block)}
        gpu.launch(STEM, kernel, (grid,), args, shared=shared, defines=defines, **more)

    for _ in range(2):
        ms = timed(lambda: launch("read_plain", 8 * sms, (pool, pool_bytes // 16, y), 256))
        note("plain read of 1 GiB", pool_bytes / ms / 1e6, "GB/s")

    shapes = (  # name, format, groups of 8 rows, superblocks
        ("head 151936x2048", "q6", 18992, 8),
        ("gate+up 12288x2048", "q4", 1536, 8),
        ("down as 16384x768", "q6", 2048, 3),
        ("qkv 5120x2048", "q4", 640, 8),
        ("attn_out 2048x4096", "q4", 256, 16),
    )
    for name, fmt, groups, supers in shapes:
        tile = {"q4": 1152, "q6": 1680}[fmt]
        nbytes = groups * supers * tile
        n = max(2, min(48, pool_bytes // nbytes))
        tiles = -(-groups // sms) * supers
        floor = timed(
            lambda: [
                launch("read_plain", 2 * sms, (pool + i * nbytes, nbytes // 16, y), overlap=True)
                for i in range(n)
            ],
        )
        note(f"{name} {fmt} ({nbytes / 1e6:.1f} MB): plain read", 1e3 * floor / n, "us")
        first = None
        for variant, block, depth in (
            ("gemv", 256, 1),
            ("lanes", 256, 1),
            ("lanes", 256, 2),
            ("lanes", 256, 3),
            ("bulk", 256, 1),
            ("bulk", 256, 2),
            ("bulk", 256, 3),
            ("bulk", 512, 1),
            ("lanes", 512, 1),
            ("gemv", 256, 1),
        ):
            steps = -(-tiles // 4)
            if depth > -(-steps // (block // 32)):
                continue
            slots = block // 32 * depth * 4 * tile
            shared = supers * ACT_BYTES + 1024 + slots + 32 * tiles + 64
            if variant == "gemv":
                shared = ACT_BYTES * 16 + 4 * max(4096, tiles * 8)
            if shared > gpu.shared_most:
                continue

            def run(i, variant=variant, block=block, depth=depth, shared=shared, **more):
                gpu.launch(
                    STEM,
                    f"{variant}_{fmt}",
                    (sms,),
                    (pool + i * nbytes, acts, y, groups, supers),
                    shared=shared,
                    defines={"BLOCK": str(block), "DEPTH": str(depth)},
                    **more,
                )

            run(1)
            got = np.empty(groups * 8, np.uint32)
            gpu.download(y, got)
            first = got if first is None else first
            same = np.array_equal(got, first)
            ms = timed(lambda: [run(i, overlap=True) for i in range(n)])
            note(f"  {variant}, {block} threads, depth {depth}, same {same}", 1e3 * ms / n, "us")

    for sizes in ((0, 0), (50 << 10, 50 << 10), (50 << 10, 120 << 10), (20 << 10, 90 << 10)):
        ms = timed(
            lambda: [
                launch("nothing", sms, (y,), 256, sizes[i % 2], overlap=True) for i in range(300)
            ],
        )
        note(f"empty kernels with {sizes} bytes of shared memory", 1e3 * ms / 300, "us")

    Path(sys.argv[1]).write_text(json.dumps({"device": gpu.name, "rows": rows}, indent=1))
    gpu.close()


main()
