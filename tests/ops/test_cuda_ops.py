"""Kernels in forms that no case is large enough to ask for, and how weights are loaded."""

import numpy as np
import pytest

from isobit import numerics
from isobit.backends.cuda.device.layout import ACT_BYTES, Layout, repack
from isobit.backends.cuda.device.load import DeviceWeight, Loader
from isobit.backends.cuda.device.memory import Region
from isobit.backends.cuda.lowering import WARPS
from isobit.backends.cuda.ops.matmul import Fit
from isobit.gguf.formats import FORMATS

from .cuda_support import Buffers, open_gpu, same
from .inputs import values, weight


@pytest.fixture(params=["emulated", "cuda"])
def gpu(request):
    device = open_gpu(request.param)
    yield device
    device.close()


def load(gpu, w):
    region = Region()
    stored = DeviceWeight.of(w, region)
    region.address = gpu.allocate(region.nbytes)
    with Loader(gpu) as loader:
        loader.matrix(w, stored)
    return stored


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize(("warps", "columns", "n"), [(8, 8, 17), (8, 16, 29), (16, 16, 33)])
@pytest.mark.parametrize(("name", "supers"), [("Q4_K", 16), ("Q6_K", 17)])
def test_batch_matmul(gpu, rng, name, supers, warps, columns, n, split):
    """Blocks that go from one group of sequences to the next, the last groups of few."""
    fmt = next(f for f in FORMATS.values() if f.name == name)
    rows, blocks = 80, 2
    w, x = weight(rng, fmt, rows, 256 * supers), values(rng, n, 256 * supers)
    stored, b = load(gpu, w), Buffers(gpu)
    acts, y = b.new(n * supers * ACT_BYTES), b.new(4 * n * rows)
    planes, width = {"PLANES": "2"}, 256 * supers
    arguments = b.put(x), width, width, 1, width, n, acts
    gpu.launch("ops/quantise", "quantise", (-(-n * supers // WARPS),), arguments, defines=planes)
    groups = np.array([[0, i, min(columns, n - i), 0] for i in range(0, n, columns)], np.int32)
    defines = {"WEIGHT": f"Tiled{name}", "DEPTH": "1", "PLANNED": "1", "COLUMNS": str(columns)}
    gpu.launch(
        "ops/batch_matmul",
        "batch_matmul",
        (blocks,),
        (stored.address, 0, stored.matrix_bytes, rows // 16, supers, acts)
        + (b.put(np.array([len(groups)], np.int32)), b.put(groups), 0, 1, y, rows),
        defines=planes | defines | {"BLOCK": str(32 * warps)} | ({"SPLIT": "1"} if split else {}),
        shared=Fit(1, warps, 1, columns).shared(stored, split=split),
    )
    same(b.get(y, (n, rows)), numerics.matmul(w, x, 2))


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4"])
def test_repack_keeps_every_byte(gpu, rng, name):
    fmt = next(f for f in FORMATS.values() if f.name == name)
    w = weight(rng, fmt, 3, 16, 768)
    stored = load(gpu, w)
    assert Layout.of(w).kind == "tiled"
    out = np.empty(w.data.nbytes, np.uint8)
    gpu.download(stored.address, out)
    assert np.array_equal(out, repack(w.data, 3, fmt.nbytes(256)))
    assert np.array_equal(np.sort(out), np.sort(w.data))
