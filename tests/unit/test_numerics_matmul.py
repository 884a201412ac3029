"""Matrix products in every format against the specification written out number by number."""

import numpy as np
import pytest

from isobit.gguf.formats import FORMATS, Format
from isobit.numerics import Weight, matmul
from tests.helpers import naive
from tests.helpers.blocks import set_d, set_dmin
from tests.helpers.passes import same_bits

QUANTISED = [f for f in FORMATS.values() if f.quantized]
FLOATS = [f for f in FORMATS.values() if not f.quantized]
NAMES = {f.name: f for f in FORMATS.values()}


def random_weight(rng: np.random.Generator, fmt: Format, rows: int, columns: int) -> Weight:
    """Random bytes; the floats among them may be any with which nothing overflows."""
    while True:
        data = rng.integers(0, 256, rows * columns // fmt.block_size * fmt.block_bytes, np.uint8)
        if not fmt.quantized:
            data = rng.standard_normal(rows * columns).astype(np.float32).view(np.uint8)
            if fmt.name != "F32":
                pairs = rng.standard_normal(rows * columns).astype(np.float32)
                data = (
                    pairs.astype(np.float16).view(np.uint8)
                    if fmt.name == "F16"
                    else np.ascontiguousarray(pairs.view(np.uint16)[1::2]).view(np.uint8)
                )
        if fmt.name == "MXFP4":
            data[:: fmt.block_bytes] %= 192
        weight = Weight("w", fmt, (rows, columns), data)
        if np.isfinite(weight.float32()).all():
            return weight


def naive_matmul(w: Weight, x: np.ndarray, planes: int) -> np.ndarray:
    rows = w.data.reshape(w.shape[0], -1)
    return np.array(
        [[naive.dot(w.format, row, t, planes) for row in rows] for t in x.tolist()], np.float32
    )


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("fmt", QUANTISED, ids=lambda f: f.name)
def test_quantised(fmt: Format, planes: int, rng: np.random.Generator) -> None:
    columns = {32: 608, 64: 704, 128: 640, 256: 768}[fmt.block_size]  # the last one may be short
    w = random_weight(rng, fmt, 3, columns)
    x = rng.standard_normal((2, columns)).astype(np.float32)
    x[1] *= 10.0 ** rng.uniform(-6, 6, columns)
    assert same_bits(matmul(w, x, planes), naive_matmul(w, x, planes))


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("fmt", QUANTISED, ids=lambda f: f.name)
def test_small_inputs(fmt: Format, planes: int, rng: np.random.Generator) -> None:
    """Blocks of zeros, of subnormals, and at the smallest scale there is."""
    w = random_weight(rng, fmt, 2, 1024)
    x = rng.standard_normal((2, 1024)).astype(np.float32)
    x[:, :256] = 0
    x[:, 256:512] *= np.float32(2.0**-140)
    x[:, 512:768] *= np.float32(2.0**-95)
    assert same_bits(matmul(w, x, planes), naive_matmul(w, x, planes))


def extreme(fmt: Format, byte: int) -> Weight:
    """A row of one superblock with every field's byte the same, and scales of 1."""
    data = np.full((256 // fmt.block_size, fmt.block_bytes), byte, np.uint8)
    set_d(fmt.name, data, 1)
    set_dmin(fmt.name, data, 1)
    return Weight("w", fmt, (1, 256), data.reshape(-1))


@pytest.mark.parametrize("fmt", QUANTISED, ids=lambda f: f.name)
@pytest.mark.parametrize("byte", [0x00, 0x80, 0x7F, 0xFF])
def test_the_largest_sums_fit(fmt: Format, byte: int) -> None:
    """Every product of one sign and as large as it gets: ``naive`` asserts the int32 bounds."""
    w = extreme(fmt, byte)
    for value in (32639, -32639, -128):  # -128: the low plane's smallest
        x = np.full((1, 256), value, np.float32)
        x[0, 0] = 32639  # so that the factor is 1
        assert same_bits(matmul(w, x, 2), naive_matmul(w, x, 2))


def test_the_bounds_in_the_specification() -> None:
    """|S_p| reaches 134,217,728 with Q6_K and |M| 526,401,792 with Q4_K and Q5_K."""
    codes, scales = NAMES["Q6_K"].unpack(extreme(NAMES["Q6_K"], 0).data.reshape(1, -1)), 128
    assert codes.codes.min() == -32
    assert 256 * 32 * scales * 128 == 134_217_728
    for name in ("Q4_K", "Q5_K"):
        mins = NAMES[name].unpack(extreme(NAMES[name], 0xFF).data.reshape(1, -1)).mins
        assert mins is not None
        assert int(mins.max()) * 256 * 32639 == 526_401_792


@pytest.mark.parametrize("fmt", FLOATS, ids=lambda f: f.name)
def test_floats(fmt: Format, rng: np.random.Generator) -> None:
    w = random_weight(rng, fmt, 5, 600)
    x = (rng.standard_normal((3, 600)) * 10.0 ** rng.uniform(-4, 4, (3, 600))).astype(np.float32)
    values = w.float32().tolist()
    expected = [
        [naive.sum256([naive.f32(a * b) for a, b in zip(row, t, strict=True)]) for row in values]
        for t in x.tolist()
    ]
    for planes in (1, 2):
        assert same_bits(matmul(w, x, planes), np.array(expected, np.float32))


@pytest.mark.parametrize("name", ["F16", "Q8_0", "Q4_K"])
def test_many_rows_and_no_tokens(name: str, rng: np.random.Generator) -> None:
    """Rows are independent however many there are; a pass may ask for no logits at all."""
    w = random_weight(rng, NAMES[name], 1, 256)
    tall = Weight("tall", w.format, (9000, 256), np.tile(w.data, 9000))
    x = rng.standard_normal((1, 256)).astype(np.float32)
    assert same_bits(matmul(tall, x, 2), np.repeat(matmul(w, x, 2), 9000, axis=1))
    assert same_bits(matmul(tall, x[:0], 2), np.zeros((0, 9000), np.float32))


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["F32", "Q8_0", "Q4_K", "Q6_K"])
def test_what_is_not_finite_shows(
    name: str, bad: float, planes: int, rng: np.random.Generator
) -> None:
    w = random_weight(rng, NAMES[name], 4, 512)
    x = rng.standard_normal((3, 512)).astype(np.float32)
    clean = matmul(w, x, planes)
    x[1, 300] = bad
    y = matmul(w, x, planes)
    assert not np.isfinite(y[1]).any()
    assert same_bits(y[[0, 2]], clean[[0, 2]])
