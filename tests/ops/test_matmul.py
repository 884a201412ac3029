"""Matrix products of every format against the specification, bit for bit."""

import numpy as np
import pytest

from isobit import numerics
from isobit.backends.cpu import _cpu
from isobit.gguf.formats import FORMATS
from isobit.numerics import Weight

from .cases import before_guard_page, edge_rows, extreme_weight, identical, values, weight


def widths(fmt):
    if not fmt.quantized:
        return (1, 7, 256, 768, 2049)
    if fmt.block_size == 256:
        return (256, 768, 2048)
    return tuple(k for k in (32, 96, 128, 256, 640, 704, 2880) if k % fmt.block_size == 0)


@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (37, 1), (5, 3), (16, 7), (130, 70)])
def test_random(ops, fmt, planes, rows, tokens, rng):
    for columns in widths(fmt):
        w = weight(rng, fmt, rows, columns)
        x = values(rng, tokens, columns)
        with np.errstate(over="ignore", invalid="ignore"):
            want = numerics.matmul(w, x, planes)
        got = ops.matmul(w, x, planes)
        finite = np.isfinite(want)
        assert finite.mean() > 0.5
        assert (np.isfinite(got) == finite).all()
        identical(np.where(finite, got, 0), np.where(finite, want, 0))


def test_edges_of_fixed_point(ops, fmt, planes, rng):
    columns = widths(fmt)[-1]
    w = weight(rng, fmt, 19, columns)
    x = edge_rows(rng, columns)
    with np.errstate(over="ignore", invalid="ignore"):
        want = numerics.matmul(w, x, planes)
    got = ops.matmul(w, x, planes)
    finite = np.isfinite(want)
    identical(np.where(finite, got, 0), np.where(finite, want, 0))


@pytest.mark.parametrize("code_byte", [0x00, 0x7F, 0x80, 0xFF])
def test_largest_integers(ops, fmt, planes, code_byte, rng):
    """All codes and sub-scales at an end with all activations at an end: nothing saturates."""
    if not fmt.quantized:
        pytest.skip("not run: float weights have no integers")
    w = extreme_weight(fmt, code_byte, 9, 512)
    x = edge_rows(rng, 512)
    x = x[np.abs(x).max(axis=1) < 1e9]
    identical(ops.matmul(w, x, planes), numerics.matmul(w, x, planes))


def test_reads_no_byte_past_the_weights(ops, fmt, planes, rng):
    for columns in widths(fmt):
        w = weight(rng, fmt, 3, columns)
        w = Weight("w", fmt, w.shape, before_guard_page(w.data))
        x = values(rng, 2, columns)
        with np.errstate(over="ignore", invalid="ignore"):
            want = numerics.matmul(w, x, planes)
        got = ops.matmul(w, x, planes)
        finite = np.isfinite(want)
        identical(np.where(finite, got, 0), np.where(finite, want, 0))


def test_broken_blocks_reach_the_result(ops, fmt, planes, rng):
    """A NaN or infinite activation makes its token's results NaN and no other's."""
    columns = widths(fmt)[-1]
    w = weight(rng, fmt, 11, columns)
    x = values(rng, 3, columns)
    x[1, columns // 2] = rng.choice(np.float32([np.nan, np.inf, -np.inf]))
    got = ops.matmul(w, x, planes)
    assert not np.isfinite(got[1]).any() if fmt.quantized else not np.isfinite(got[1]).all()
    identical(got[[0, 2]], ops.matmul(w, np.ascontiguousarray(x[[0, 2]]), planes))


def test_dequantised_rows(ops, fmt, rng):
    w = weight(rng, fmt, 5, 512)
    identical(ops.dequantize(w), w.float32())


@pytest.mark.parametrize("columns", [1, 31, 32, 255, 256, 300, 2048])
def test_quantise(ops, planes, columns, rng):
    x = np.concatenate([values(rng, 5, columns), edge_rows(rng, columns)])
    for got, want in zip(
        ops.quantise_rows(x, planes), numerics.quantise_rows(x, planes), strict=True
    ):
        identical(got, want)


def test_quantise_refuses_to_hide_non_finite_values(ops, planes):
    x = np.ones((3, 256), np.float32)
    x[0, 3], x[1, 255] = np.nan, -np.inf
    q, d = ops.quantise_rows(x, planes)
    assert np.isnan(d[:2]).all()
    assert d[2] > 0
    assert not q[:2].any()


def test_the_formats_of_the_kernels_are_those_of_the_table():
    table = [
        (f.name, f.ggml_type, f.block_size, f.block_bytes) for f in FORMATS.values() if f.quantized
    ]
    assert sorted(_cpu.formats()) == sorted(table)
