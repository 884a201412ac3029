"""Inputs for the operations: random ones over many decades, and those at the edges."""

import ctypes
import mmap

import numpy as np

from isobit.gguf import formats
from isobit.numerics import Weight
from tests.helpers.blocks import set_d, set_dmin

EDGES = [0.0, -0.0, 1e-45, -1e-42, -1e-38, 2.0**-96, 87, -87, -87.00001, 88, 88.00001, 88.5]
EDGES += [-88.5, 100.0, -100.0, 1e30, -1e30, -3e38]
"""Numbers at which exponentials, gates and fixed point change their ways."""


def identical(got, want):
    """Equal shape, dtype and bits; says where the first difference lies."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    if got.tobytes() != want.tobytes():
        a, b = got.view(np.uint8), np.ascontiguousarray(want).view(np.uint8)
        at = tuple(np.argwhere((a != b).reshape(*got.shape, -1).any(axis=-1))[0])
        raise AssertionError(f"differs first at {at}: {got[at]!r} instead of {want[at]!r}")


def before_guard_page(data):
    """A copy of bytes that ends where reading further is a segmentation fault."""
    size = -(-len(data) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    whole = np.frombuffer(memory, np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    guard = ctypes.c_void_p(whole.ctypes.data + size)
    assert libc.mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    copy = whole[size - len(data) : size]
    copy[:] = data
    return copy


def values(rng, *shape):
    """Floats over many decades from block to block; some zeros, some subnormal, some equal."""
    x = rng.standard_normal(shape).astype(np.float32)
    *front, n = shape
    decades = 10.0 ** rng.uniform(-9, 9, (*front, -(-n // 32)))
    x *= np.repeat(decades, 32, axis=-1)[..., :n].astype(np.float32)
    x[rng.random(shape) < 0.05] = 0
    x[rng.random(shape) < 0.02] = -0.0
    return x


def edge_rows(rng, columns):
    """Rows for fixed point: zeros, subnormals, around 2^-96, ties, limits, one value alone."""
    full = lambda v: np.full(columns, v, np.float32)  # noqa: E731
    sign = rng.choice(np.float32([-1, 1]), columns)
    tiny = np.float32(1e-45)
    one = full(0)
    one[rng.integers(columns)] = -3
    ties = (rng.integers(-65278, 65279, columns) / np.float32(2)).astype(np.float32)
    ties[0] = 32639
    largest_low = full(32384)  # high 127, low -128
    largest_low[::256] = 32639
    rows = [
        full(0),
        full(-0.0),
        sign * tiny,
        sign * np.float32(2.0**-96),
        sign * np.nextafter(np.float32(2.0**-96), np.float32(0)),
        sign * np.float32(3e38),
        one,
        ties,
        ties / 32639 * 127,
        full(1),
        full(-1),
        largest_low,
        -largest_low,
        rng.integers(-127, 128, columns).astype(np.float32),
    ]
    return np.stack(rows).astype(np.float32)


def around_edges(rng, rows, columns):
    """Rows of numbers, the first of them of EDGES."""
    x = rng.standard_normal((rows, columns)) * np.exp(rng.standard_normal((rows, 1)))
    n = min(rows, len(EDGES))
    x[:n] = rng.permuted(np.resize(EDGES, (columns, len(EDGES))), axis=1)[:, :n].T
    return x.astype(np.float32)


def floats(x):
    """A weight of these float32 values."""
    x = np.ascontiguousarray(x, np.float32)
    return Weight("w", formats.F32, x.shape, x.reshape(-1).view(np.uint8))


def weight(rng, fmt, *shape):
    """Random blocks: every code and sub-scale; float scales over decades, also 0 and negative."""
    if not fmt.quantized:
        data = values(rng, *shape) / np.float32(1e5)
        if fmt.name == "F16":
            with np.errstate(over="ignore"):
                data = np.clip(data, -65504, 65504).astype(np.float16)
        elif fmt.name == "BF16":
            data = (data.view(np.uint32) >> 16).astype(np.uint16)
        return Weight("w", fmt, shape, data.reshape(-1).view(np.uint8))
    blocks = rng.integers(
        0, 256, (int(np.prod(shape)) // fmt.block_size, fmt.block_bytes), dtype=np.uint8
    )
    for write in (set_d, set_dmin):
        d = rng.standard_normal(len(blocks)) * 10.0 ** rng.uniform(-8, 3, len(blocks))
        d[rng.random(len(d)) < 0.05] = 0
        write(fmt.name, blocks, d)
    return Weight("w", fmt, shape, blocks.reshape(-1))


def extreme_weight(fmt, code_byte, rows, columns):
    """Blocks whose every byte is ``code_byte`` (0xFF: largest codes and scales), d = dmin = 1."""
    blocks = np.full((rows * columns // fmt.block_size, fmt.block_bytes), code_byte, np.uint8)
    set_d(fmt.name, blocks, 1)
    set_dmin(fmt.name, blocks, 1)
    if fmt is formats.Q6_K:
        blocks[:, 192:208] = 0x80  # -128, the largest sub-scale
    return Weight("w", fmt, (rows, columns), blocks.reshape(-1))


def powers_weight(rng, columns):
    """MXFP4 of 256 rows with each exponent of d in turn: subnormal and huge ones too."""
    fmt = formats.MXFP4
    blocks = rng.integers(0, 256, (256, columns // 32, 17), dtype=np.uint8)
    blocks[:, :, 0] = np.arange(256)[:, None]
    return Weight("w", fmt, (256, columns), blocks.reshape(-1))
