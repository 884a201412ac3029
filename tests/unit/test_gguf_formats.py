"""Block layouts and decoding, bit for bit against the ``gguf`` package."""

import gguf
import numpy as np
import pytest

from isobit.errors import UsageError
from isobit.gguf import formats
from isobit.gguf.formats import FORMATS, Format, dequantize, type_name
from isobit.gguf.grids import grids
from tests.helpers import blocks as fields
from tests.helpers.blocks import set_d, set_dmin

ALL = pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
QUANTIZED = pytest.mark.parametrize(
    "fmt", [f for f in FORMATS.values() if f.quantized], ids=lambda f: f.name
)

# float16 bit patterns: zeros, least and greatest subnormal, least and greatest normal, infinities,
# quiet and signalling NaNs, one.
HALVES = [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00]
HALVES += [0x7E00, 0xFE01, 0x7C01, 0xFDFF, 0x3C00]
RANGES = {  # code, scale, min: least and greatest
    "Q8_0": ((-128, 127), (1, 1), None),
    "Q4_0": ((-8, 7), (1, 1), None),
    "Q4_1": ((0, 15), (1, 1), (1, 1)),
    "Q5_0": ((-16, 15), (1, 1), None),
    "Q5_1": ((0, 31), (1, 1), (1, 1)),
    "Q2_K": ((0, 3), (0, 15), (0, 15)),
    "Q3_K": ((-4, 3), (-32, 31), None),
    "Q4_K": ((0, 15), (0, 63), (0, 63)),
    "Q5_K": ((0, 31), (0, 63), (0, 63)),
    "Q6_K": ((-32, 31), (-128, 127), None),
    "IQ4_NL": ((-127, 113), (1, 1), None),
    "IQ4_XS": ((-127, 113), (-32, 31), None),
    "MXFP4": ((-12, 12), (1, 1), None),
    "NVFP4": ((-12, 12), (1, 1), None),
    "Q1_0": ((-1, 1), (1, 1), None),
    "Q2_0": ((-1, 2), (1, 1), None),
    "TQ1_0": ((-1, 1), (1, 1), None),
    "TQ2_0": ((-1, 2), (1, 1), None),
    "IQ1_S": ((-9, 9), (1, 15), None),
    "IQ1_M": ((-9, 9), (1, 15), None),
    "IQ2_XXS": ((-43, 43), (1, 31), None),
    "IQ2_XS": ((-43, 43), (1, 31), None),
    "IQ2_S": ((-43, 43), (1, 31), None),
    "IQ3_XXS": ((-62, 62), (1, 31), None),
    "IQ3_S": ((-15, 15), (1, 31), None),
}


def random_blocks(rng, fmt: Format, n: int) -> np.ndarray:
    return rng.integers(0, 256, (n, fmt.block_bytes), dtype=np.uint8)


def oracle(fmt: Format, blocks: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        if fmt.name in ("Q1_0", "Q2_0"):  # which the package cannot decode (0.19)
            d = blocks[:, :2].copy().view("<f2").astype(np.float32)
            bits = 1 if fmt.name == "Q1_0" else 2
            fields = blocks[:, 2:, None] >> np.arange(0, 8, bits) & (1 << bits) - 1
            codes = fields.reshape(len(blocks), -1).astype(np.float32)
            return d * (2 * codes - 1 if bits == 1 else codes - 1)
        return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(fmt.ggml_type))


def assert_same_bits(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Equal bits; a NaN equals a NaN of other sign or payload."""
    assert ours.dtype == theirs.dtype == np.float32
    assert ours.shape == theirs.shape
    nan = np.isnan(theirs)
    np.testing.assert_array_equal(np.isnan(ours), nan)
    np.testing.assert_array_equal(ours.view(np.uint32)[~nan], theirs.view(np.uint32)[~nan])


@ALL
def test_sizes_and_ids_are_those_of_ggml(fmt):
    assert getattr(formats, fmt.name) is fmt
    ggml_type = gguf.GGMLQuantizationType[fmt.name]
    assert fmt.ggml_type == ggml_type
    assert (fmt.block_size, fmt.block_bytes) == gguf.GGML_QUANT_SIZES[ggml_type]


def test_blocks_lie_at_multiples_of_their_alignment():
    for fmt in FORMATS.values():
        assert fmt.block_bytes % fmt.alignment == 0
        assert fmt.block_bytes % (2 * fmt.alignment) != 0


def test_every_type_of_ggml_has_a_name():
    for ggml_type in gguf.GGMLQuantizationType:
        assert type_name(ggml_type.value) == ggml_type.name
    assert type_name(99) == "type 99"


@ALL
def test_random_bytes_decode_to_the_same_bits(fmt, rng):
    n = 5003  # more than one chunk, and not a multiple of one
    blocks = random_blocks(rng, fmt, n)
    ours = dequantize(fmt, blocks.reshape(-1), (n, fmt.block_size))
    assert_same_bits(ours, oracle(fmt, blocks))


@pytest.mark.parametrize(
    "fmt", [f for f in FORMATS.values() if f.name in fields.HALVES], ids=lambda f: f.name
)
def test_special_scales_decode_to_the_same_bits(fmt, rng):
    n = len(HALVES) ** 2
    for filler in (random_blocks(rng, fmt, n), np.zeros((n, 1)), np.full((n, 1), 255)):
        blocks = np.empty((n, fmt.block_bytes), np.uint8)
        blocks[:] = filler
        pairs = np.array([(a, b) for a in HALVES for b in HALVES], "<u2")
        for at, half in zip(fields.HALVES[fmt.name], pairs.T, strict=False):
            blocks[:, at : at + 2] = half[:, None].copy().view(np.uint8)
        ours = dequantize(fmt, blocks.reshape(-1), (n, fmt.block_size))
        assert_same_bits(ours, oracle(fmt, blocks))
        assert np.isnan(ours).any()
        assert np.isfinite(ours).any()


def test_every_exponent_of_mxfp4_decodes_to_the_same_bits(rng):
    blocks = random_blocks(rng, formats.MXFP4, 256)
    blocks[:, 0] = np.arange(256)
    ours = dequantize(formats.MXFP4, blocks.reshape(-1), (256, 32))
    assert_same_bits(ours, oracle(formats.MXFP4, blocks))
    assert 0 < np.abs(ours[0]).max() < 2.0**-124


def test_special_scales_of_iq1_m_decode_to_the_same_bits(rng):
    blocks = random_blocks(rng, formats.IQ1_M, len(HALVES))
    nibbles = np.array(HALVES)[:, None] >> np.arange(0, 16, 4) & 15
    blocks[:, 49:57:2] = blocks[:, 49:57:2] & 15 | nibbles << 4
    ours = dequantize(formats.IQ1_M, blocks.reshape(-1), (len(blocks), 256))
    assert_same_bits(ours, oracle(formats.IQ1_M, blocks))
    assert np.isnan(ours).any()


def test_every_scale_of_nvfp4_decodes_to_the_same_bits(rng):
    """Subnormal ones, the one that is no number, and those with the bit that is not looked at."""
    blocks = random_blocks(rng, formats.NVFP4, 256)
    blocks[:, :4] = (np.arange(256)[:, None] + np.arange(0, 256, 64)) % 256
    ours = dequantize(formats.NVFP4, blocks.reshape(-1), (256, 64))
    assert_same_bits(ours, oracle(formats.NVFP4, blocks))
    assert not ours[0x7F, :16].any()
    assert np.abs(ours[0xFF, :16]).max() > 448


@pytest.mark.parametrize("name", ["IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"])
def test_grids_are_those_of_the_package(name):
    theirs = getattr(gguf.quants, name)
    theirs.init_grid()
    grid = grids()["IQ1" if name == "IQ1_S" else name]
    scale = 8 if name == "IQ1_S" else 1
    np.testing.assert_array_equal(grid, theirs.grid[0, 0] * scale)


@pytest.mark.parametrize("fmt", [formats.F16, formats.BF16], ids=lambda f: f.name)
def test_every_16_bit_pattern_decodes_to_the_same_bits(fmt):
    raw = np.arange(1 << 16, dtype="<u2").view(np.uint8)
    assert_same_bits(dequantize(fmt, raw, (1 << 16,)), oracle(fmt, raw.reshape(1, -1))[0])


@QUANTIZED
def test_unpacked_integers_have_their_stated_types_and_ranges(fmt, rng):
    n = 3000
    u = fmt.unpack(random_blocks(rng, fmt, n))
    blocks, size = n * fmt.parts, fmt.block_size // fmt.parts
    assert (u.codes.dtype, u.codes.shape) == (np.int16, (blocks, size))
    assert (u.scales.dtype, u.scales.shape) == (np.int32, (blocks, fmt.groups))
    assert (u.d.dtype, u.d.shape) == (np.float32, (blocks,))
    assert size % fmt.groups == 0
    codes, scales, mins = RANGES[fmt.name]
    assert (u.codes.min(), u.codes.max()) == codes
    assert (u.scales.min(), u.scales.max()) == scales
    assert (u.mins is None) == (u.dmin is None) == (mins is None)
    if u.mins is not None and u.dmin is not None:
        assert (u.mins.dtype, u.mins.shape) == (np.int32, (n, fmt.groups))
        assert (u.dmin.dtype, u.dmin.shape) == (np.float32, (n,))
        assert (u.mins.min(), u.mins.max()) == mins


@QUANTIZED
@pytest.mark.parametrize("second", [0, 1])
def test_unpacked_integers_make_the_values(fmt, second, rng):
    """With d = 1 and a second scale of 0 or 1 the formula is exact: it pins codes, scales, mins."""
    blocks = random_blocks(rng, fmt, 200)
    set_d(fmt.name, blocks, 1)
    set_dmin(fmt.name, blocks, second)
    u = fmt.unpack(blocks)
    run = u.codes.shape[1] // fmt.groups
    values = u.d[:, None] * (u.codes * np.repeat(u.scales, run, axis=1)).astype(np.float32)
    if u.mins is not None:
        values -= u.dmin[:, None] * np.repeat(u.mins, run, axis=1)
    np.testing.assert_array_equal(values.reshape(200, -1), oracle(fmt, blocks))


@QUANTIZED
def test_no_blocks_unpack_to_nothing(fmt):
    u = fmt.unpack(np.empty((0, fmt.block_bytes), np.uint8))
    assert u.codes.shape == (0, fmt.block_size // fmt.parts)
    assert u.scales.shape == (0, fmt.groups)


@QUANTIZED
def test_a_strided_view_unpacks(fmt, rng):
    view = rng.integers(0, 256, (64, 2 * fmt.block_bytes), dtype=np.uint8)[:, 1::2]
    ours, same = fmt.unpack(view), fmt.unpack(view.copy())
    np.testing.assert_array_equal(ours.codes, same.codes)
    np.testing.assert_array_equal(ours.scales, same.scales)
    np.testing.assert_array_equal(ours.d, same.d)


@ALL
def test_decoding_makes_a_new_array(fmt):
    data = np.zeros(fmt.block_bytes, np.uint8)
    data.setflags(write=False)
    out = dequantize(fmt, data, (1, 1, fmt.block_size))
    assert out.shape == (1, 1, fmt.block_size)
    assert out.flags.writeable
    assert not np.shares_memory(out, data)


def test_wrong_sizes_are_refused():
    with pytest.raises(UsageError, match=r"Q4_K.*got 143 bytes"):
        dequantize(formats.Q4_K, np.zeros(143, np.uint8), (256,))
    with pytest.raises(UsageError, match="Q4_K"):
        dequantize(formats.Q4_K, np.zeros(144, np.uint8), (255,))
    with pytest.raises(UsageError, match=r"expected uint8 \[n, 144\]"):
        formats.Q4_K.unpack(np.zeros((1, 143), np.uint8))
    with pytest.raises(UsageError, match=r"expected a quantised format, got F32"):
        formats.F32.unpack(np.zeros((1, 4), np.uint8))
