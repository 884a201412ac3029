"""Single CUDA kernels against the specification, in forms that cases do not ask for: emulated, and
on a GPU if any. Outputs lie between sentinels."""

import numpy as np
import pytest

from isobit import numerics
from isobit.backends.cuda.device.layout import ACT_BYTES, COLUMN_ACT_BYTES, Layout, repack
from isobit.backends.cuda.device.load import DeviceWeight, matrix_parts
from isobit.backends.cuda.device.memory import Region
from isobit.backends.cuda.ops import head_matmul
from isobit.backends.cuda.ops.launch_shapes import LaunchShape
from isobit.backends.cuda.ops.matmul import prefers_tensor_cores
from isobit.backends.cuda.ops.top_k import ordering_bytes
from isobit.gguf.formats import FORMATS
from isobit.numerics import KV_PAGE, Weight
from tests.helpers.blocks import set_d, set_dmin
from tests.helpers.seed import SEED

from .cuda_emulator import EmulatedGpu
from .cuda_support import F32, Alone, Buffers, open_gpu, same


@pytest.fixture(params=["emulated", "cuda"])
def gpu(request):
    device = open_gpu(request.param)
    yield device
    device.close()


def activations(rng, *shape):
    """Values over many decades, with zeros, a zero block, subnormals and outliers."""
    x = (rng.standard_normal(shape) * 10 ** rng.uniform(-4, 4, shape)).astype(F32)
    x[rng.random(shape) < 0.05] = 0
    x[rng.random(shape) < 0.02] = F32(1e-41)
    flat = x.reshape(-1)
    flat[: min(256, flat.size // 3)] = 0
    return x


def random_weight(rng, fmt, *shape):
    """A weight of random bytes whose float scales are finite."""
    values = int(np.prod(shape))
    data = rng.integers(0, 256, (values // fmt.block_size, fmt.block_bytes), dtype=np.uint8)
    if fmt.quantized:
        for write in (set_d, set_dmin):
            d = rng.standard_normal(len(data)) * 10 ** rng.uniform(-6, 1, len(data))
            write(fmt.name, data, d)
    else:
        floats = rng.standard_normal(values).astype(F32)
        if fmt.name == "BF16":
            data = (floats.view(np.uint32) >> 16).astype(np.uint16)
        else:
            data = floats.astype({"F32": np.float32, "F16": np.float16}[fmt.name])
        data = data.view(np.uint8)
    return Weight("w", fmt, shape, np.ascontiguousarray(data).reshape(-1))


def quantised(gpu, ops, x):
    """Rows of activations on the device: (address of floats, address of Acts)."""
    b = Buffers(gpu)
    rows, n = x.shape
    values, acts = b.put(x), b.new(rows * -(-n // 256) * ACT_BYTES)
    ops.quantise(values, n, rows, acts)
    return values, acts


def load(gpu, weight):
    region = Region()
    stored = DeviceWeight.of(weight, region)
    region.address = gpu.allocate(region.nbytes)
    gpu.bring([*matrix_parts(weight, stored)])()
    return stored


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("columns", [256, 600])
def test_quantise(gpu, rng, planes, columns):
    x = activations(rng, 5, columns)
    x[1, 3] = np.inf
    x[2, 255] = np.nan
    x[3, :256], x[4, :256] = 1, -1  # the largest sums
    b, ops = Buffers(gpu), Alone(gpu, planes)
    supers = -(-columns // 256)
    acts = b.new(5 * supers * ACT_BYTES)
    ops.quantise(b.put(x), columns, 5, acts)
    got = b.get(acts, (5, supers, ACT_BYTES), np.uint8)
    q, d = numerics.quantise_rows(x, planes)
    padded = np.zeros((5, supers * 256), np.int32)
    padded[:, :columns] = q
    padded = padded.reshape(5, supers, 256)
    for p, plane in enumerate(numerics.planes_of(padded, planes)):
        assert np.array_equal(got[..., 256 * p : 256 * (p + 1)].view(np.int8), plane)
    sums = padded.reshape(5, supers, 16, 16).sum(-1)
    assert np.array_equal(np.ascontiguousarray(got[..., 576:640]).view(np.int32), sums)
    sums = padded.reshape(5, supers, 8, 32).sum(-1)
    assert np.array_equal(np.ascontiguousarray(got[..., 544:576]).view(np.int32), sums)
    digits = got[..., 512:536].view(np.int8).reshape(5, supers, 3, 8).astype(np.int32)
    assert np.array_equal(np.tensordot(digits, [1, 256, 65536], (2, 0)), sums)
    scale = np.ascontiguousarray(got[..., 536:540]).view(F32)[..., 0]
    finite = np.isfinite(d)
    assert np.array_equal(scale[finite], d[finite])
    assert np.isnan(scale[~finite]).all()
    assert (~finite).sum() == 2


@pytest.mark.parametrize(("name", "columns"), [("F32", 2880), ("F16", 8192), ("BF16", 8448)])
def test_matmul_of_floats(gpu, rng, name, columns):
    """Rows that leave a thread room for several, for one and for none; lanes of -0 alone."""
    fmt = next(f for f in FORMATS.values() if f.name == name)
    w, x = random_weight(rng, fmt, 21, columns), activations(rng, 5, columns)
    x[1] = -0.0
    w.data[: fmt.nbytes(columns)] &= 127  # no weight of the first row is negative
    ops, b = Alone(gpu, 2), Buffers(gpu)
    y = b.new(4 * 5 * 24)
    ops.matmul(load(gpu, w), b.put(x), 0, y, 5, row_stride=24)
    got = b.get(y, (5, 24))
    same(got[:, :21], numerics.matmul(w, x, 2))
    assert (got[:, 21:].view(np.uint32) == 0x5B5B5B5B).all()


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("name", ["Q4_K", "Q6_K"])
def test_matmul_of_many(gpu, rng, name, planes):
    """Blocks of tokens and of rows that are full, half full and nearly empty."""
    fmt = next(f for f in FORMATS.values() if f.name == name)
    for rows, columns, tokens in ((136, 768, 16), (8, 256, 9), (256, 512, 41)):
        w, x = random_weight(rng, fmt, rows, columns), activations(rng, tokens, columns)
        if name == "Q4_K":  # the largest of codes, scales and activations
            w.data[4:144] = 255
        else:
            w.data[:192], w.data[192:208] = 0, 128
        x[-1], x[-2] = F32(1e30), F32(-1e30)
        ops, b = Alone(gpu, planes), Buffers(gpu)
        values, acts = quantised(gpu, ops, x)
        y, stored = b.new(4 * tokens * (rows + 3)), load(gpu, w)
        assert prefers_tensor_cores(stored, tokens, stack=False)
        ops.matmul(stored, values, acts, y, tokens, row_stride=rows + 3)
        got = b.get(y, (tokens, rows + 3))
        same(got[:, :rows], numerics.matmul(w, x, planes))
        assert (got[:, rows:].view(np.uint32) == 0x5B5B5B5B).all()


BATCHES = [(8, 8, 17, 11), (8, 16, 29, 8), (16, 8, 33, 16), (8, 32, 61, 9)]


@pytest.mark.parametrize(("warps", "columns", "n", "supers"), BATCHES)
@pytest.mark.parametrize("name", ["Q4_K", "Q6_K"])
def test_batch_matmul(gpu, rng, name, supers, warps, columns, n):
    """Blocks, or clusters of them, that go from one group of tokens to the next, the last groups of
    few; each unit by all warps. They fetch ahead what is there, and nothing else."""
    gpu = EmulatedGpu(SEED, bulk=True) if isinstance(gpu, EmulatedGpu) else gpu
    fmt = next(f for f in FORMATS.values() if f.name == name)
    rows, together = 16 * int(rng.integers(3, 12)), int(rng.integers(1, 3))
    w, x = random_weight(rng, fmt, rows, 256 * supers), activations(rng, n, 256 * supers)
    stored, b = load(gpu, w), Buffers(gpu)
    _, acts = quantised(gpu, Alone(gpu, 2), x)
    y = b.new(4 * n * rows)
    defines = {"WEIGHT": f"Tiled{name}", "DEPTH": "1", "PLANNED": "1", "COLUMNS": str(columns)}
    Alone(gpu, 2).launch(
        "ops/batch_matmul",
        (together * int(rng.integers(1, 4)),),
        (stored.address, 0, stored.matrix_bytes, rows // 16, supers, acts, 0, 0, 0, 1)
        + (y, rows, 0, 0, n, 0, 1, 0, 0)
        + (stored.address, stored.address, fmt.nbytes(8 * 256 * supers), rows // 8),
        defines | {"BLOCK": str(32 * warps), "SPLIT": "1", "CLUSTER": str(together), "AHEAD": "3"},
        shared=LaunchShape(1, warps, 1, columns).shared(stored, split=True),
    )
    same(b.get(y, (n, rows)), numerics.matmul(w, x, 2))


@pytest.mark.parametrize(("warps", "columns", "n", "supers"), [(2, 32, 50, 6), (8, 16, 16, 2)])
@pytest.mark.parametrize("name", ["Q4_K", "Q6_K"])
def test_batch_matmul_in_chunks(gpu, rng, name, supers, warps, columns, n):
    """Blocks with all row blocks of a group, whose last round is of few; the last group of few."""
    fmt = next(f for f in FORMATS.values() if f.name == name)
    w, x = random_weight(rng, fmt, 16 * 9, 256 * supers), activations(rng, n, 256 * supers)
    stored, b = load(gpu, w), Buffers(gpu)
    _, acts = quantised(gpu, Alone(gpu, 2), x)
    y = b.new(4 * n * 144)
    defines = {"WEIGHT": f"Tiled{name}", "DEPTH": "2", "PLANNED": "1", "COLUMNS": str(columns)}
    Alone(gpu, 2).launch(
        "ops/batch_matmul",
        (-(-n // columns) * 3,),
        (stored.address, 0, stored.matrix_bytes, 9, supers, acts, 0, 0, 0, 1)
        + (y, 144, 0, 0, n, 0, 1, 0, 0, 0, 0, 0, 0),
        defines | {"BLOCK": str(32 * warps), "SUPERS_AT_ONCE": "2"},
        shared=LaunchShape(1, warps, 2, columns, chunk=2).shared(stored),
    )
    same(b.get(y, (n, 144)), numerics.matmul(w, x, 2))


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize(
    ("n", "supers"), [(9, 1), (16, 9), (29, 9), (32, 8), (64, 6)]
)  # all superblocks at once, some of them
def test_head_by_warpgroups(gpu, rng, n, supers, planes):
    """Warpgroups with several rounds of rows, with one and with none."""
    emulated = isinstance(gpu, EmulatedGpu)
    gpu = EmulatedGpu(SEED, bulk=True) if emulated else gpu
    if not gpu.warpgroups:
        pytest.skip("not run: this GPU has no products of warpgroups")
    gpu.multiprocessors = 2 if emulated else gpu.multiprocessors
    fmt = next(f for f in FORMATS.values() if f.name == "Q6_K")
    rows = 64 * int(rng.integers(1, 10))
    w = random_weight(rng, fmt, rows, 256 * supers)
    w.data[:192], w.data[192:208] = 0, 128  # the largest of codes, scales and activations
    x = activations(rng, n, 256 * supers)
    x[-1], x[-2] = F32(1e30), F32(-1e30)
    stored, b, ops = load(gpu, w), Buffers(gpu), Alone(gpu, planes)
    _, acts = quantised(gpu, ops, x)
    y = b.new(4 * n * (rows + 3))
    head_matmul.launch(ops, stored, acts, n, y, rows + 3)
    got = b.get(y, (n, rows + 3))
    same(got[:, :rows], numerics.matmul(w, x, planes))
    assert (got[:, rows:].view(np.uint32) == 0x5B5B5B5B).all()


@pytest.mark.parametrize(("n", "supers"), [(3, 2), (37, 3), (16, 1)])
@pytest.mark.parametrize("names", [("Q4_K",), ("Q6_K", "Q4_K"), ("Q4_K", "Q6_K")])
def test_part_matmul(gpu, rng, names, supers, n):
    """Products in parts, of one superblock each, added up in order."""
    fmts = [next(f for f in FORMATS.values() if f.name == name) for name in names]
    rows = [16 * int(rng.integers(1, 12)) for _ in names]
    weights = [random_weight(rng, f, r, 256 * supers) for f, r in zip(fmts, rows, strict=True)]
    x, stored, b = activations(rng, n, 256 * supers), [load(gpu, w) for w in weights], Buffers(gpu)
    _, acts = quantised(gpu, Alone(gpu, 2), x)
    parts, warps, slices = b.new(4 * supers * n * sum(rows)), 2, int(rng.integers(1, 4))
    rounds = -(-sum(rows) // 16 // (slices * warps)) + 1
    more = [(stored[1].address, rows[1] // 16)] if len(names) > 1 else [(0, 0)]
    defines = {"WEIGHT": f"Tiled{names[0]}", "BLOCK": str(32 * warps)}
    defines |= {"AHEAD": "3"} | ({"MORE": f"Tiled{names[1]}"} if names[1:] else {})
    Alone(gpu, 2).launch(
        "ops/part_matmul",
        (slices * supers,),
        (stored[0].address, more[0][0], rows[0] // 16, more[0][1], supers, slices, acts, n)
        + (parts, sum(rows), stored[0].address, stored[0].address)
        + (fmts[0].nbytes(8 * 256 * supers), rows[0] // 8),
        defines | {"ROUNDS": str(rounds)},
        shared=n * COLUMN_ACT_BYTES + warps * rounds * 16 * max(f.block_bytes for f in fmts),
    )
    y = np.zeros((n, sum(rows)), F32)
    for part in b.get(parts, (supers, n, sum(rows))):
        y += part
    same(y, np.concatenate([numerics.matmul(w, x, 2) for w in weights], axis=1))


@pytest.mark.parametrize(("warps", "columns", "n", "supers"), BATCHES)
@pytest.mark.parametrize("name", ["Q4_K", "Q6_K"])
def test_batch_matmul_of_experts(gpu, rng, name, supers, warps, columns, n):
    """Blocks that order the pairs themselves, where most experts have several groups and some have
    none; activations that are quantised on their way."""
    fmt = next(f for f in FORMATS.values() if f.name == name)
    rows, k, experts = 16 * int(rng.integers(1, 4)), 3, 5 + n // columns
    w = random_weight(rng, fmt, experts, rows, 256 * supers)
    x = activations(rng, n * k, 256 * supers)
    ids = np.array([rng.permutation(experts - 1)[:k] for _ in range(n)], np.int32)
    stored, b, pairs = load(gpu, w), Buffers(gpu), n * k
    y = b.new(4 * pairs * rows)
    defines = {"WEIGHT": f"Tiled{name}", "DEPTH": "1", "PLANNED": "1", "COLUMNS": str(columns)}
    defines |= {"BLOCK": str(32 * warps), "OWN_ORDER": "1", "FLOATS": "1", "TOGETHER": "1"}
    defines |= {"ONCE": "1"}
    Alone(gpu, 2).launch(
        "ops/batch_matmul",
        (int(rng.integers(2, 6)),),
        (stored.address, 0, stored.matrix_bytes, rows // 16, supers, b.put(x), b.put(ids))
        + (0, 0, 1, y, rows, 0, 0, pairs, experts, k, 0, 0, 0, 0, 0, 0),
        defines,
        shared=LaunchShape(1, warps, 1, columns).shared(stored)
        + ordering_bytes(n, k, experts, columns),
    )
    each = zip(x, ids.reshape(-1), strict=True)
    expected = [numerics.matmul(w.expert(e), row[None], 2)[0] for row, e in each]
    same(b.get(y, (pairs, rows)), np.array(expected, F32))


@pytest.mark.parametrize(("blocks", "n"), [(3, 40), (50, 5), (2, 0)])
def test_batch_matmul_of_listed_groups(gpu, rng, blocks, n):
    """Blocks with equal parts of the work, of groups of one pair and of many; of none."""
    fmt, rows, k, experts, columns = FORMATS[12], 48, 2, 9, 16
    assert fmt.name == "Q4_K"
    w, x = random_weight(rng, fmt, experts, rows, 256), activations(rng, n * k + 1, 256)[: n * k]
    ids = np.array([rng.permutation(experts - 1)[:k] for _ in range(n)], np.int32).reshape(n, k)
    order, _, groups = sorted_pairs(ids, experts, columns)
    stored, b = load(gpu, w), Buffers(gpu)
    y = b.new(4 * n * k * rows)
    acts = quantised(gpu, Alone(gpu, 2), x)[1] if n else 0
    put = [b.put(a.astype(np.int32)) for a in (np.array([len(groups) - 1]), groups, order)]
    defines = {"WEIGHT": "TiledQ4_K", "DEPTH": "1", "PLANNED": "1", "COLUMNS": str(columns)}
    Alone(gpu, 2).launch(
        "ops/batch_matmul",
        (blocks,),
        (stored.address, 0, stored.matrix_bytes, rows // 16, 1, acts, *put, 1)
        + (y, rows, 0, 0, n * k, experts, k, 0, 0, 0, 0, 0, 0),
        defines | {"BLOCK": "64", "WEIGHED": "1"},
        shared=LaunchShape(1, 2, 1, columns).shared(stored),
    )
    each = zip(x, ids.reshape(-1), strict=True)
    expected = [numerics.matmul(w.expert(e), row[None], 2)[0] for row, e in each]
    same(b.get(y, (n * k, rows)), np.array(expected, F32).reshape(n * k, rows))


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q8_0", "IQ4_XS", "MXFP4", "F16"])
def test_matmul_of_experts(gpu, rng, name):
    fmt = next(f for f in FORMATS.values() if f.name == name)
    experts, rows, columns, tokens, k = 5, 24, 512, 9, 2
    w = random_weight(rng, fmt, experts, rows, columns)
    x = activations(rng, tokens, columns)
    ids = np.array([rng.permutation(experts - 1)[:k] for _ in range(tokens)], np.int32)
    ops, b = Alone(gpu, 2), Buffers(gpu)
    order, offset = b.new(4 * tokens * k), b.new(4 * (experts + 1))
    ops.sort_pairs(b.put(ids), tokens, k, experts, order, offset)
    counts = np.bincount(ids.reshape(-1), minlength=experts)
    assert np.array_equal(b.get(offset, (experts + 1,), np.int32), [0, *np.cumsum(counts)])
    got = b.get(order, (tokens * k,), np.int32)
    assert np.array_equal(got, np.argsort(ids.reshape(-1), kind="stable"))
    values, acts = quantised(gpu, ops, x)
    y = b.new(4 * tokens * k * rows)
    ops.matmul(load(gpu, w), values, acts, y, tokens * k, routing=(order, offset, k))
    expected = [
        [numerics.matmul(w.expert(e), x[t : t + 1], 2)[0] for e in ids[t]] for t in range(tokens)
    ]
    same(b.get(y, (tokens, k, rows)), np.array(expected, F32))


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4"])
def test_repack_keeps_every_byte(gpu, rng, name):
    fmt = next(f for f in FORMATS.values() if f.name == name)
    w = random_weight(rng, fmt, 3, 16, 768)
    stored = load(gpu, w)
    assert Layout.of(w).kind == "tiled"
    out = np.empty(w.data.nbytes, np.uint8)
    gpu.download(stored.address, out)
    assert np.array_equal(out, repack(w.data, 3, fmt.nbytes(256)))
    assert np.array_equal(np.sort(out), np.sort(w.data))


@pytest.mark.parametrize("n", [64, 512, 1000, 4360])  # warps take one superblock, or two
@pytest.mark.parametrize("kind", ["plain", "residual", "experts"])
def test_norm_quantise(gpu, rng, n, kind):
    k = 10 if kind == "experts" else 1
    for rows in (1, 3):
        x, norm, more = activations(rng, rows, n), activations(rng, n), activations(rng, rows, k, n)
        weights = rng.random((rows, k)).astype(F32)
        b, ops = Buffers(gpu), Alone(gpu, 2)
        y, acts, at = b.new(4 * rows * n), b.new(rows * -(-n // 256) * ACT_BYTES), b.put(x)
        added = (b.put(more), k) if kind != "plain" else (0, 0)
        shares = b.put(weights) if kind == "experts" else 0
        ops.norm(at, b.put(norm), 1e-6, n, rows, y, acts, added, shares)
        if kind == "residual":
            x = x + more[:, 0]
        elif kind == "experts":
            x = x + numerics.combine(weights, more)
        same(b.get(at, x.shape), x)
        expected = numerics.rms_norm(x, norm, F32(1e-6))
        same(b.get(y, x.shape), expected)
        _, expected_acts = quantised(gpu, ops, expected)
        size = rows * -(-n // 256) * ACT_BYTES
        blocks = b.get(acts, (size // ACT_BYTES, ACT_BYTES), np.uint8)
        wanted = b.get(expected_acts, blocks.shape, np.uint8)
        assert np.array_equal(blocks[:, :700], wanted[:, :700])  # the rest is nobody's


@pytest.mark.parametrize(("experts", "k"), [(16, 4), (128, 8), (300, 10), (4, 4)])
@pytest.mark.parametrize("normalise", [True, False])
def test_router(gpu, rng, experts, k, normalise):
    z = rng.standard_normal((5, experts)).astype(F32) * 4
    z[1] = np.round(z[1])  # ties
    z[2] = 0
    z[3, experts // 2] = 500  # all others have probability 0
    b, ops = Buffers(gpu), Alone(gpu, 2)
    ids, weights = b.new(4 * 5 * k), b.new(4 * 5 * k)
    arguments = (b.put(z), 5, experts, k, int(normalise), 1, 0, 1, 1, ids, weights)
    ops.launch("ops/top_k.router_top_k", (1,), arguments, {"PARTS": -(-experts // 32)})
    expected_ids, expected_weights, _ = numerics.top_k(z, k, normalise=normalise)
    assert np.array_equal(b.get(ids, (5, k), np.int32), expected_ids)
    same(b.get(weights, (5, k)), expected_weights)
    outputs = activations(rng, 5, k, 70)
    y = b.new(4 * 5 * 70)
    ops.launch("ops/combine", (5,), (weights, b.put(outputs), k, 70, y, 70, 0))
    same(b.get(y, (5, 70)), numerics.combine(expected_weights, outputs))


def sorted_pairs(ids, experts, columns):
    """What top_k.cu says of the pairs: their order, offsets, and groups of up to ``columns``."""
    here = np.flatnonzero((ids >= 0) & (ids < experts))
    ids = ids.reshape(-1)[here]
    order = here[np.argsort(ids, kind="stable")]
    offset = np.array([0, *np.cumsum(np.bincount(ids, minlength=experts))])
    groups, cost = [], 0
    for e in range(experts):
        for i in range(offset[e], offset[e + 1], columns):
            groups.append((e, i, count := min(columns, offset[e + 1] - i), cost))
            cost += 1 - -count // 8
    return order, offset, np.array([*groups, (0, 0, 0, cost)])


class Sorted:
    """Where the order of some pairs goes."""

    def __init__(self, b, pairs, experts):
        self.b, self.pairs, self.experts = b, pairs, experts
        self.at = b.new(4 * pairs), b.new(4 * (experts + 1)), b.new(16 * pairs + 16), b.new(4)

    def check(self, ids, columns):
        order, offset, groups = sorted_pairs(ids, self.experts, columns)
        at, get = self.at, self.b.get
        assert np.array_equal(get(at[0], order.shape, np.int32), order)
        assert np.array_equal(get(at[1], (self.experts + 1,), np.int32), offset)
        assert get(at[3], (1,), np.int32) == len(groups) - 1
        assert np.array_equal(get(at[2], groups.shape, np.int32), groups)


@pytest.mark.parametrize(("tokens", "experts", "k"), [(3, 40, 4), (256, 128, 8), (600, 33, 10)])
def test_sort_pairs(gpu, rng, tokens, experts, k):
    """A word of tokens, many, and a broken one; experts that nobody chose; some of the experts."""
    ids = np.stack([rng.permutation(experts - 1)[:k] for _ in range(tokens)]).astype(np.int32)
    b, ops = Buffers(gpu), Alone(gpu, 2)
    to = Sorted(b, tokens * k, experts)
    ops.sort_pairs(at := b.put(ids), tokens, k, experts, *to.at[:2], to.at[2:], 24)
    to.check(ids, 24)
    first, here = 5, 17
    to = Sorted(b, tokens * k, here)
    ops.sort_pairs(at, tokens, k, here, *to.at[:2], to.at[2:], 24, first)
    to.check(ids - first, 24)


@pytest.mark.parametrize(("experts", "k", "groups"), [(160, 8, (5, 3)), (300, 40, (1, 1))])
def test_router_of_groups(gpu, rng, experts, k, groups):
    """Of a sigmoid, with a bias of the choice; ranks that a lane has two of."""
    tokens = 11
    z = rng.random((tokens, experts)).astype(F32)
    z[4] = np.round(z[4])
    b, ops = Buffers(gpu), Alone(gpu, 2)
    defines = {"PARTS": -(-experts // 32)} | ({"GROUPED": 1} if groups[1] < groups[0] else {})
    ids, weights = b.new(4 * tokens * k), b.new(4 * tokens * k)
    arguments = b.put(z), tokens, experts, k, 1, 0, b.put(z[0]), *groups, ids, weights
    shared = 4 * 8 * (experts + groups[0])
    ops.launch("ops/top_k.router_top_k", (2,), arguments, defines, shared=shared)
    found, scores = b.get(ids, (tokens, k), np.int32), z + z[0]
    own = np.sort(scores.reshape(tokens, groups[0], -1), axis=-1)
    best = np.argsort(-(own[..., -1] + own[..., -2]), axis=-1, kind="stable")[:, : groups[1]]
    for t in range(tokens):
        mine = np.isin(np.arange(experts) // (experts // groups[0]), best[t])
        order = np.argsort(np.where(mine, -scores[t], np.inf), kind="stable")[:k]
        assert np.array_equal(found[t], order)
    chosen, total = np.take_along_axis(z, found, 1), np.zeros(tokens, F32)
    for rank in range(k):
        total = total + chosen[:, rank]
    same(b.get(weights, (tokens, k)), chosen / np.maximum(total, F32(2**-14))[:, None])


def test_head_vectors_of_runs(gpu, rng):
    """Tokens together leave in the cache what each alone does: runs that begin anywhere, some with
    all of sixteen positions, whose values are stored together; the last token is there often."""
    heads, kv_heads, head_dim, pages = 2, 1, 64, 8
    parts = [(0, 8), (8, 8), *((int(rng.integers(60)), int(rng.integers(1, 60))) for _ in "ab")]
    positions = np.concatenate([np.arange(a, a + n) for a, n in parts]).astype(np.int32)
    sequence = np.repeat([0, 2, 4, 6], [n for _, n in parts]).astype(np.int32)  # two pages each
    qkv = activations(rng, len(positions), heads + 2 * kv_heads, head_dim)
    again = np.minimum(np.arange(len(positions) + 16), len(positions) - 1)
    positions, sequence, qkv = positions[again], sequence[again], qkv[again]
    b, defines = Buffers(gpu), {"HEADS": heads, "KV_HEADS": kv_heads, "HEAD_DIM": head_dim}
    fixed = [b.put(activations(rng, head_dim)) for _ in range(2)]
    turns = [b.put(rng.random((128, head_dim // 2)).astype(F32)) for _ in range(2)]
    table = b.put(rng.permutation(pages).astype(np.int32))
    sizes = [2 * pages * kv_heads * KV_PAGE * n for n in (head_dim, head_dim, 2, 2)]

    def store(cache, at):
        n = len(positions[at])
        where = b.put(positions[at]), b.put(sequence[at]), table, 1
        results = b.new(2 * n * heads * head_dim), b.new(4 * n * heads)
        arguments = (b.put(qkv[at]), *fixed, 1e-6, *turns, *where, 0.1, *results, *cache, n)
        blocks = -(-n * (heads + 2 * kv_heads) // 8)
        Alone(gpu, 2).launch("fusions/head_vectors", (blocks,), arguments, defines)

    together, alone = ([b.put(np.zeros(n, np.uint8)) for n in sizes] for _ in range(2))
    store(together, slice(None))
    for i in range(len(positions)):
        store(alone, slice(i, i + 1))
    for x, y, n in zip(together, alone, sizes, strict=True):
        assert np.array_equal(b.get(x, (n,), np.uint8), b.get(y, (n,), np.uint8)), parts
