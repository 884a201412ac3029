"""What cases do not show: operations of parts of a model, refusals, formats, infinities."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pytest

from isobit.backends.base import Backend
from isobit.backends.cpu import CpuBackend, _cpu
from isobit.backends.cpu.lowering import Lowering
from isobit.backends.reference import ReferenceBackend
from isobit.config import EngineConfig
from isobit.errors import BackendUnavailable
from isobit.gguf.formats import FORMATS
from isobit.model.graph import Builder, Value
from isobit.model.weights import Weights
from isobit.numerics.ops import (
    Add,
    Columns,
    Embedding,
    Gather,
    GatherExperts,
    Heads,
    MatMul,
    SelectRows,
    Silu,
    TopK,
)
from tests.helpers.geometries import QWEN3_30B_A3B
from tests.helpers.seed import SEED
from tests.model.test_split import Meeting

from .cases.pointwise import softcap
from .harness import Case, Writer, specified, traced, written
from .inputs import floats


def gathered(g: Writer, x: Value, rank: int) -> Value:
    """Of each of three parts other columns of the row: parts' ranges and sizes differ."""
    parts = (((0, 5), (31, 40)), ((5, 30),), ((30, 31),))
    size = (14, 25, 1)[rank]
    return g.one("y", Gather(parts, rank), g.one(None, Heads(7 * rank, 3, size), x))


def gathered_experts(g: Writer, x: Value, rank: int) -> Value:
    """The same from the part that has a row's expert, of which one has but one."""
    _, ids = g.add(None, TopK(3, normalise=True), g.one(None, Columns(0, 8), x))
    mine = g.one(None, Heads(8 + 9 * rank, 3, 20), x)
    return g.one("y", GatherExperts((0, 3, 4, 8), rank), mine, ids)


@pytest.mark.parametrize("write", [gathered, gathered_experts], ids=lambda c: c.__name__)
@pytest.mark.parametrize("threads", [1, 2])
def test_parts_of_a_value_are_put_together(write: Callable[..., Value], threads: int) -> None:
    """Three parts that run side by side, each a thread here; their memory holds a few rows."""
    meeting, memory = Meeting(3), np.zeros(4 * 64 + 2 * 3 * 4 * 300, np.uint8)

    def alike(g: Writer, rank: int) -> Value:
        g.rng = np.random.default_rng(SEED)
        return write(g, g.around_edges(96), rank)

    def backends(weights: Weights, engine: EngineConfig, rank: int) -> Iterator[Backend]:
        yield ReferenceBackend(weights, engine, exchange=meeting.exchange(rank))
        yield CpuBackend(weights, engine, exchange=(memory, rank, 3))

    def part(rank: int) -> list[np.ndarray]:
        w = written(Case(alike, {"rank": rank}, (20, 20), ((1,),)))
        found = []
        with np.errstate(all="ignore"):
            for backend in backends(w.weights, replace(w.engine, threads=threads), rank):
                passes = [traced(backend, batch)["y"] for _, batch in w.passes[0]]
                found.append(np.concatenate(passes))
                backend.close()
        return found

    with ThreadPoolExecutor(3) as pool:
        every = [y.view(np.uint32) for found in pool.map(part, range(3)) for y in found]
    assert len(np.unique(every[0])) > 300
    assert all(np.array_equal(y, every[0]) for y in every)


def test_an_infinity_stays_under_a_softcap() -> None:
    """So that a model that overflows is refused, and its logits are not taken for finite ones."""
    _, stages = specified(Case(softcap, {"normed": False}))
    y = stages["y"]
    assert np.isneginf(y).sum() == 96  # one of the edges in each column
    assert (np.abs(y[np.isfinite(y)]) <= 2.5).all()


def test_an_operation_that_a_backend_lacks_is_named() -> None:
    @dataclass(frozen=True)
    class Unheard(Add):
        kind = "unheard_of"

    g = Builder("case")
    x = g.one("x", Embedding(), g.tokens, weights=[floats(np.ones((3, 4)))])
    with g.layer(7):
        x = g.one("y", Unheard(), x, x)
    wanted = g.one(None, SelectRows(), g.one(None, Silu(), x), g.logit_rows)
    head = g.one("lm_head", MatMul(), wanted, weights=[floats(np.ones((2, 4)))])
    weights = Weights(QWEN3_30B_A3B, g.graph(head))
    with pytest.raises(
        BackendUnavailable, match=r"^cpu: unheard_of of layer 7 is not implemented$"
    ):
        CpuBackend(weights, EngineConfig(context=64))


@pytest.mark.parametrize("wrong", [np.float64, lambda x: x.repeat(2)[::2]], ids=["type", "gaps"])
def test_a_vector_that_would_have_to_be_copied_is_refused(wrong: Callable[..., object]) -> None:
    """The extension keeps where vectors lie, and not the copies of others."""
    w = written(Case(softcap, {"normed": True}))
    program = Lowering(w.weights.graph).program()
    program |= {"planes": 2, "pages": 1, "sequences": 0, "lane_tokens": 0}
    assert _cpu.Engine(program, "", 1)
    steps = [s for p in program["phases"] for _, _, steps in p["chains"] for s in steps]
    norm = next(s for s in steps if s["vectors"])
    norm["vectors"] = [wrong(v) for v in norm["vectors"]]
    with pytest.raises(ValueError, match="float32 in one piece"):
        _cpu.Engine(program, "", 1)


def test_the_formats_of_the_kernels_are_those_of_the_table() -> None:
    table = [
        (f.name, f.ggml_type, f.block_size, f.block_bytes) for f in FORMATS.values() if f.quantized
    ]
    assert sorted(_cpu.formats()) == sorted(table)
