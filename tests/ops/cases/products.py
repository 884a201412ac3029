"""Matrix products, rows of tables and products of experts, in every format."""

from collections.abc import Sequence

import numpy as np

from isobit.gguf import formats
from isobit.gguf.formats import FORMATS
from isobit.model.graph import Value
from isobit.numerics import Weight
from isobit.numerics.ops import (
    Columns,
    Combine,
    Embedding,
    ExpertBias,
    ExpertMatMul,
    MatMul,
    SelectRows,
    SiluGate,
    TopK,
)
from tests.ops.harness import Array, Case, Writer
from tests.ops.inputs import edge_rows, extreme_weight, floats, powers_weight, values, weight

NAMED = {f.name: f for f in FORMATS.values()}


def widths(fmt: formats.Format) -> tuple[int, ...]:
    """Short rows, rows that are no whole superblocks, more superblocks than lanes."""
    if not fmt.quantized:
        return 1, 7, 256, 600, 2049
    if fmt.block_size == 256:
        return 256, 768, 2304
    return tuple(k for k in (32, 192, 256, 800, 896, 2880) if k % fmt.block_size == 0)


def one_hot(rng: np.random.Generator, rows: int, columns: int) -> Weight:
    """Q8_0 with a 1 in each row: products show activations as they are quantised."""
    blocks = np.zeros((rows, columns // 32, 34), np.uint8)
    blocks[:, :, :2] = np.float16(1).reshape(1).view(np.uint8)
    at = np.resize(rng.permutation(columns), rows)
    blocks[np.arange(rows), at // 32, 2 + at % 32] = 1
    return Weight("w", formats.Q8_0, (rows, columns), blocks.reshape(-1))


def rows_of_all_kinds(g: Writer, columns: int) -> Array:
    """The edges of fixed point, values over many decades, and rows that are not finite."""
    edges = edge_rows(g.rng, columns)
    x = np.concatenate([values(g.rng, 11, columns), edges, values(g.rng, 3, columns)])
    x[-3:, columns // 2] = np.nan, np.inf, -np.inf
    return x


def matmul(g: Writer, fmt: str) -> Value:
    """Of each width; and the largest integers that can occur, where nothing may saturate."""
    f = NAMED[fmt]
    for i, columns in enumerate(widths(f)):
        rows = (13, 40, 5, 37, 1, 24)[i]
        y = g.one(f"y{i}", MatMul(), g.given(rows_of_all_kinds(g, columns)), weights=[
            weight(g.rng, f, rows, columns)
        ])  # fmt: skip
    if f.quantized:
        x = np.nan_to_num(rows_of_all_kinds(g, 1280), posinf=1, neginf=1)
        x[np.abs(x).max(axis=1) > 1e9] = 32639
        for byte in (0x00, 0x7F, 0x80, 0x88, 0xFF):
            w = extreme_weight(f, byte, 3, 1280)
            g.one(f"extreme {byte}", MatMul(), g.given(x), weights=[w])
    return y


def matmul_of_many(g: Writer, fmt: str) -> Value:
    """More tokens than are taken at once, and as many rows as threads share."""
    f = NAMED[fmt]
    for i, columns in enumerate(widths(f)):
        x = g.given(values(g.rng, g.rows, columns))
        y = g.one(f"y{i}", MatMul(), x, weights=[weight(g.rng, f, 130, columns)])
    return y


def matmul_in_tiles(g: Writer, fmt: str) -> Value:
    """Tiles of tokens and of rows that are full, half full and nearly empty; two matrices side by
    side, of which the first has the largest codes, scales and activations."""
    f = NAMED[fmt]
    for rows, columns in ((136, 768), (8, 256), (256, 512)):
        w = weight(g.rng, f, rows, columns)
        w.data[: f.block_bytes] = extreme_weight(f, 255, 1, 256).data
        x = values(g.rng, g.rows, columns)
        x[-1], x[-2] = 1e30, -1e30
        more = floats(g.rng.standard_normal((3, columns)))
        y = g.one(f"y{rows}", MatMul(), g.given(x), weights=[w, more])
    return y


def matmul_of_each_number(g: Writer, fmt: str) -> Value:
    """Tiles of tokens of each length, with the largest codes, scales and activations."""
    w = weight(g.rng, NAMED[fmt], 21, 512)
    for row, byte in enumerate((0x00, 0x7F, 0x80, 0x88, 0xFF)):
        w.data[row * len(w.data) // 21 :][: w.format.block_bytes] = extreme_weight(
            w.format, byte, 1, 256
        ).data
    x = values(g.rng, g.rows, 512)
    x[::5], x[1::7] = 1e30, -1e30
    return g.one("y", MatMul(), g.given(x), weights=[w])


def matmul_side_by_side(g: Writer) -> Value:
    """q, k and v of other formats."""
    rows = {"Q4_K": 40, "Q5_K": 13, "Q6_K": 24, "F16": 11}
    ws = [weight(g.rng, NAMED[name], n, 512) for name, n in rows.items()]
    ws.insert(1, weight(g.rng, NAMED["Q4_K"], 13, 512))
    return g.one("y", MatMul(), g.given(values(g.rng, g.rows, 512)), weights=ws)


def matmul_in_steps(g: Writer, fmt: str, columns: int) -> Value:
    """A token of each of many sequences: groups of eight, the last of one."""
    x = g.given(values(g.rng, g.rows, columns))
    return g.one("y", MatMul(), x, weights=[weight(g.rng, NAMED[fmt], 80, columns)])


def matmul_of_wanted_rows(g: Writer, fmt: str) -> Value:
    """The head."""
    x = g.normed(g.given(values(g.rng, g.rows, 512)))
    wanted = g.one(None, SelectRows(), x, g.logit_rows)
    return g.one("y", MatMul(), wanted, weights=[weight(g.rng, NAMED[fmt], 72, 512)])


def every_scale_of_mxfp4(g: Writer, columns: int) -> Value:
    decades = np.float64(10) ** np.array([[-28], [-8], [-2], [0], [2], [9]])
    x = g.given(g.rng.standard_normal((6, columns)) * decades)
    return g.one("y", MatMul(), x, weights=[powers_weight(g.rng, columns)])


def every_scale_of_nvfp4(g: Writer, columns: int) -> Value:
    """And those with the bit that is not looked at, in products and in rows of a table."""
    blocks = g.rng.integers(0, 256, (64, columns // 64, 36), dtype=np.uint8)
    blocks[:, :, :4] = np.arange(256).reshape(64, 1, 4)
    w = Weight("w", NAMED["NVFP4"], (64, columns), blocks.reshape(-1))
    g.one("rows", Embedding(), g.tokens, weights=[w])
    x = g.given(g.rng.standard_normal((g.rows, columns)))
    return g.one("y", MatMul(), x, weights=[w])


def quantise(g: Writer) -> Value:
    """Activations as products read them, value by value."""
    for columns in (32, 256, 288, 2080):
        x = g.given(rows_of_all_kinds(g, columns))
        w = one_hot(g.rng, min(columns, 128), columns)
        y = g.one(f"y{columns}", MatMul(), x, weights=[w])
    return y


def embedding(g: Writer, fmt: str) -> Value:
    """Tables with and without whole tiles of rows."""
    f = NAMED[fmt]
    for rows, columns in ((16, 512), (11, 384 if f.block_size < 256 else 512)):
        table = weight(g.rng, f, rows, columns)
        y = g.one(f"y{rows}", Embedding(), g.tokens, weights=[table])
    return y


def routed(g: Writer, experts: int, k: int) -> tuple[Value, Value]:
    """Weights and ids of experts, one of them everybody's, one nobody's."""
    z = g.rng.standard_normal((g.rows, experts))
    z[:, 0] += 5
    z[:, experts // 2] -= 100 * (experts > k)
    shares, ids = g.add(("shares", "ids"), TopK(k, normalise=True), g.given(z))
    return shares, ids


def experts(g: Writer, kinds: Sequence[str], n: int, k: int, shown: bool) -> Value:
    """Gate, up, SwiGLU, down and the weighted sum; ``shown``: each is there to be compared."""
    gate, up, down = (NAMED[kind] for kind in kinds)
    shares, ids = routed(g, n, k)
    x = g.given(g.rng.standard_normal((g.rows, 512)) * 1e-6)
    inner = 256 if down.block_size == 256 else 288  # where it can be no whole superblocks
    stacks = weight(g.rng, gate, n, inner, 512), weight(g.rng, up, n, inner, 512)
    name = ["gate", "up"] if shown else [None, None]
    parts = [g.one(name[i], ExpertMatMul(), x, ids, weights=[w]) for i, w in enumerate(stacks)]
    together = g.one("silu" if shown else None, SiluGate(), *parts)
    stack = weight(g.rng, down, n, 72, inner)
    y = g.one("down" if shown else None, ExpertMatMul(), together, ids, weights=[stack])
    return g.one("out", Combine(), shares, y)


def expert_matmul(g: Writer, fmt: str, columns: int = 512) -> Value:
    _, ids = routed(g, 5, 2)
    x = g.given(values(g.rng, g.rows, columns))
    return g.one("y", ExpertMatMul(), x, ids, weights=[weight(g.rng, NAMED[fmt], 5, 24, columns)])


def experts_of_two_choices(g: Writer, k: int) -> Value:
    """By turns, and the first once more."""
    x = g.given(values(g.rng, g.rows, 64))
    choices = [g.add((None, None), TopK(k, True), g.columns(x, 9 * i, 7 + i))[1] for i in (0, 1, 2)]
    for i, ids in enumerate([*choices, choices[0]]):
        stack = floats(g.rng.standard_normal((ids.shape.below, 24, 64)))
        y = g.one(f"y{i}", ExpertMatMul(), x, ids, weights=[stack])
    return y


def expert_bias(g: Writer, normed: bool) -> Value:
    x = g.random(96, normed)
    _, ids = g.add(None, TopK(2, normalise=True), g.one(None, Columns(3, 5), x))
    y = g.one(None, ExpertMatMul(), x, ids, weights=[floats(g.rng.standard_normal((5, 24, 96)))])
    return g.one("y", ExpertBias(), y, ids, weights=[floats(g.rng.standard_normal((5, 24)))])


MANY = "wgpu", "emulated"
SUPERBLOCKS = "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"
NUMBERS = tuple(n * (n + 1) // 2 for n in range(1, 33))
NO_AMX = "wgpu", "emulated", "cuda", "cpu-portable", "cpu-avx2", "cpu-neon"
DOT_PLAIN = "Q4_K", "Q6_K", "Q8_0"
ONE_PLANE = ("Q4_K", "Q6_K", "Q5_1", "Q3_K", "IQ4_NL", "IQ4_XS", "MXFP4", "IQ2_S", "NVFP4")


KINDS = ("Q4_K", "Q4_K", "Q6_K"), ("Q5_K", "Q3_K", "Q2_K"), ("Q8_0", "Q4_1", "Q5_0")
KINDS += ("BF16", "BF16", "F16"), ("IQ4_XS", "IQ4_XS", "MXFP4"), ("Q6_K", "Q6_K", "F16")
STEPS = {"lengths": (1,) * 17, "cuts": ((),)}
CASES = (
    *(
        Case(
            matmul,
            {"fmt": name},
            (28,),
            ((1, 12),),
            planes,
            finite=True,
            also=(
                *(("dot-plain",) if name in DOT_PLAIN and planes == 2 else ()),
                *(("amx",) if name in SUPERBLOCKS else ()),
            ),
            not_on=() if name in ONE_PLANE or planes == 2 else ("wgpu",),  # which compiles for long
        )
        for name in NAMED
        for planes in (1, 2)
    ),
    *(
        Case(
            matmul_of_many,
            {"fmt": name},
            (81,),
            ((70, 71, 74),),
            p,
            finite=True,
            also=("amx",) if name in SUPERBLOCKS else (),
            not_on=MANY,
        )
        for name in NAMED
        for p in (1, 2)
    ),
    *(
        Case(matmul_in_tiles, {"fmt": name}, (41,), ((), (9, 25)), p)
        for name in ("Q4_K", "Q6_K")
        for p in (1, 2)
    ),
    *(
        Case(
            matmul_of_each_number,
            {"fmt": name},
            (34 * 33 // 2,),
            (NUMBERS,),
            p,
            also=("amx",),
            not_on=NO_AMX,
        )
        for name in SUPERBLOCKS
        for p in (1, 2)
    ),
    Case(matmul_side_by_side, lengths=(5,), cuts=((),)),
    *(
        Case(matmul_in_steps, {"fmt": name, "columns": n}, **STEPS)  # type: ignore[arg-type]
        for name, n in (("Q4_K", 2048), ("Q4_K", 1280), ("Q6_K", 2816), ("Q6_K", 1280))
    ),
    *(Case(matmul_of_wanted_rows, {"fmt": f}, (140,)) for f in ("Q6_K", "F16")),
    *(
        Case(every_scale_of_mxfp4, {"columns": n}, (6,), ((),), p, finite=True)
        for n in (320, 512)
        for p in (1, 2)
    ),
    *(
        Case(every_scale_of_nvfp4, {"columns": n}, (64,), ((1, 4), ()), p)
        for n in (64, 512)
        for p in (1, 2)
    ),
    *(Case(quantise, {}, (28,), ((),), p) for p in (1, 2)),
    *(Case(embedding, {"fmt": name}, (11,), ((),)) for name in NAMED),
    *(
        Case(
            experts,
            {"kinds": kinds, "n": n, "k": k, "shown": (i + j) % 2 == 0},
            (tokens,),
            ((),),
            1 if i == j else 2,
            also=("unfused",),
            not_on=("emulated",) if tokens > 9 else (),
        )
        for i, kinds in enumerate(KINDS)
        for j, (tokens, n, k) in enumerate(((9, 5, 2), (1, 16, 4), (40, 4, 3), (3, 1, 1)))
        if i < 3 or j < 2
    ),
    *(
        Case(expert_matmul, {"fmt": name}, (9,), ((),), finite=True)
        for name in ("Q4_K", "Q6_K", "Q8_0", "IQ4_XS", "MXFP4", "F16")
    ),
    *(
        Case(
            expert_matmul,
            {"fmt": name, "columns": 2304},
            (90,),
            ((),),
            finite=True,
            also=("amx",),
            not_on=NO_AMX,
        )
        for name in ("Q4_K", "Q6_K")
    ),
    Case(experts_of_two_choices, {"k": 3}, (9, 3), ((), (1,))),
    *(Case(expert_bias, {"normed": n}) for n in (False, True)),
)
