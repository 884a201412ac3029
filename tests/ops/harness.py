"""One description of a case, and how it is checked on a backend.

A case writes a small graph: rows that are given, the operation, a head for what a pass has to give.
The reference backend runs it as specified, once. Each other backend (ways.py) runs the same tokens
cut as the case says and must give the same bits of every value that has a name, and leave alone
what lies behind the memory of each.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from isobit.backends.base import Backend, Batch
from isobit.backends.reference import ReferenceBackend
from isobit.config import EngineConfig
from isobit.model.graph import Builder, Value
from isobit.model.weights import Weights
from isobit.numerics import KV_PAGE, Weight
from isobit.numerics.ops import (
    LOGIT_ROWS,
    Columns,
    Embedding,
    Heads,
    MatMul,
    Operation,
    RmsNorm,
    SelectRows,
)
from tests.helpers.geometries import QWEN3_30B_A3B
from tests.helpers.seed import SEED

from .inputs import around_edges, before_guard_page, floats

VARIANTS = "unfused", "dot-plain", "amx"
"""Ways for a few cases: op by op, where a backend takes several operations in one; without the
packed dot product; with a matrix unit, which is for some products alone."""

Array = NDArray[np.generic]
Stages = dict[str, Array]


@dataclass(frozen=True, eq=False)
class Case:
    """What is checked of an operation."""

    write: Callable[..., Value]
    """Writes the operation into a graph; gives the value that must be compared."""
    of: Mapping[str, object] = field(default_factory=dict)
    """Its shapes, formats and the like: arguments of ``write``."""
    lengths: tuple[int, ...] = (70, 70)
    """Tokens of each sequence."""
    cuts: tuple[tuple[int, ...], ...] = ((), (1, 2, 5, 33))
    """Where their tokens are cut into passes, each time from the start."""
    planes: int = 2
    first: int = 0
    """The position of each sequence's first token."""
    also: tuple[str, ...] = ()
    """Of VARIANTS, those that it is run in, too."""
    not_on: tuple[str, ...] = ()
    """Ways, by the begin of their names, on which it would take long and show little."""
    finite: bool = False
    """Whether all that is said of results beyond the finite ones is which they are."""
    unsupported: Mapping[str, str] = field(default_factory=dict)
    """Ways, by the begin of their names, that have to refuse it, and what they say."""
    holds: Callable[[Stages], None] | None = None
    """What must hold of the stages, where they are not those of the specification."""

    @property
    def name(self) -> str:
        """As tests are called: unique."""
        said = [_said(v) for v in self.of.values()]
        tokens = [f"{sum(self.lengths)} tokens"]
        return " ".join([self.write.__name__, *said, *tokens, *["1-plane"] * (self.planes == 1)])


def _said(value: object) -> str:
    if isinstance(value, bool | np.bool_):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return ",".join(map(_said, value))
    return value.__name__ if callable(value) else str(value)


class Writer(Builder):
    """Writes a case's graph of what it gives, with random numbers of its own."""

    def __init__(self, case: Case) -> None:
        super().__init__(case.name)
        self.rng = np.random.default_rng([SEED, crc32(case.name.encode())])
        self.rows = sum(case.lengths)

    def add(  # type: ignore[override]
        self, names: object, operation: Operation, *inputs: Value, weights=(), **more: object
    ) -> tuple[Value, ...]:
        """Each weight under a name of its own, as in a file, and before a guard page."""
        named = [
            Weight(
                f"w {len(self._ops)}.{i}", w.format, w.shape, before_guard_page(w.data.reshape(-1))
            )
            for i, w in enumerate(weights)
        ]
        return super().add(names, operation, *inputs, weights=named, **more)  # type: ignore[arg-type]

    def given(self, x: Array) -> Value:
        """float32 [rows, width] as a value: rows of an embedding, one a token."""
        assert len(x) == self.rows
        return self.one(None, Embedding(), self.tokens, weights=[floats(x)])

    def around_edges(self, columns: int, normed: bool = False) -> Value:
        """Rows of numbers, the first at the edges; ``normed``: what a norm gives lies elsewhere."""
        x = self.given(around_edges(self.rng, self.rows, columns))
        return self.normed(x) if normed else x

    def random(self, columns: int, normed: bool = False) -> Value:
        """Rows of numbers without the edges."""
        x = self.given(self.rng.standard_normal((self.rows, columns)))
        return self.normed(x) if normed else x

    def normed(self, x: Value) -> Value:
        """Through a norm."""
        return self.one(None, RmsNorm(1e-6), x, weights=[self.vector(x.shape.width)])

    def vector(self, n: int) -> Weight:
        """A weight of n."""
        return floats(self.rng.standard_normal(n))

    def heads(self, x: Value, first: int, count: int, size: int, step: int | None = None) -> Value:
        """Vectors of a row."""
        return self.one(None, Heads(first, count, size, *[step] * (step is not None)), x)

    def columns(self, x: Value, first: int, n: int) -> Value:
        """Columns of a row."""
        return self.one(None, Columns(first, n), x)


@dataclass(frozen=True, eq=False)
class Written:
    """A case's graph and its passes."""

    weights: Weights
    engine: EngineConfig
    result: str
    passes: list[list[tuple[NDArray[np.intp], Batch]]]
    """Of each cutting: which tokens, and the batch."""


def written(case: Case) -> Written:
    """Write a case's graph, and a head for what a pass has to give."""
    g = Writer(case)
    with np.errstate(all="ignore"):
        y = case.write(g, **case.of)
    assert y.name is not None
    last = y
    if y.shape.rows != LOGIT_ROWS:
        end = g.one(None, RmsNorm(1e-6), g.random(8), weights=[g.vector(8)])
        wanted = g.one(None, SelectRows(), end, g.logit_rows)
        last = g.one("head", MatMul(), wanted, weights=[floats(g.rng.standard_normal((16, 8)))])
    passes = [list(_passes(case, g.rng, n)) for n in range(len(case.cuts))]
    longest = case.first + max(case.lengths)
    engine = EngineConfig(
        activation_bits=8 * case.planes,
        context=longest + 1,
        max_sequences=len(case.lengths),
        pages=-(-(longest + 1) // KV_PAGE) * len(case.lengths) * len(case.cuts),
        chunk=max(len(at) for cut in passes for at, _ in cut),
        threads=3,
    )
    return Written(Weights(QWEN3_30B_A3B, g.graph(last)), engine, y.name, passes)


@lru_cache(1)
def specified(case: Case) -> tuple[Written, Stages]:
    """A case, and by the reference backend its stages: of all tokens, each as if its logits were
    wanted."""
    w = written(case)
    at, whole = next(_passes(replace(case, cuts=((),)), np.random.default_rng(SEED), 0))
    reference = ReferenceBackend(w.weights, w.engine)
    with np.errstate(all="ignore"):
        stages = traced(reference, replace(whole, logit_rows=at.astype(np.int32)))
    reference.close()
    return w, stages


def _passes(
    case: Case, rng: np.random.Generator, cutting: int
) -> Iterator[tuple[NDArray[np.intp], Batch]]:
    """The passes of one cutting, on pages that no other has."""
    sequences = len(case.lengths)
    begins = np.cumsum([0, *case.lengths])
    each = -(-(case.first + max(case.lengths) + 1) // KV_PAGE)
    pages = cutting * sequences * each + rng.permutation(sequences * each)
    longest = max(case.lengths)
    for a, b in pairwise((0, *(c for c in case.cuts[cutting] if c < longest), longest)):
        tokens = [np.arange(min(a, n), min(b, n)) for n in case.lengths]
        at = np.concatenate([begins[s] + t for s, t in enumerate(tokens)])
        ends = np.cumsum([len(t) for t in tokens if len(t)]) - 1
        step = len(ends) == len(at)
        yield (
            at,
            Batch(
                at.astype(np.int32),
                (case.first + np.concatenate(tokens)).astype(np.int32),
                np.repeat(np.arange(sequences), [len(t) for t in tokens]).astype(np.int32),
                pages.reshape(sequences, each).astype(np.int32),
                (ends if step else np.arange(len(at))[::-2]).astype(np.int32),
                np.roll(np.arange(sequences, dtype=np.int32), cutting),
            ),
        )


def traced(backend: Backend, batch: Batch) -> Stages:
    """Every stage of a pass."""
    found: Stages = {}

    def tap(stage: str, _layer: int | None, value: Array) -> None:
        assert stage not in found
        found[stage] = np.array(value)

    backend.run(batch, tap=tap)
    return found


def check(case: Case, backend: Backend, intact: Callable[[], None]) -> None:
    """Every pass of every cutting gives the specification's bits, and writes nothing else."""
    wanted, stages = specified(case)
    fused_away = {stage for stage, _ in backend.fused_away}
    compared = [name for name in stages if name not in fused_away]
    assert wanted.result in compared, "the case's own result is not compared"
    for passes in wanted.passes:
        for at, batch in passes:
            got = traced(backend, batch)
            intact()
            assert list(got) == compared
            if case.holds:
                case.holds(got)
                continue
            for name, value in got.items():
                of_rows = wanted.weights.graph.stages[name, None].value.shape.rows == LOGIT_ROWS
                rows = at[batch.logit_rows] if of_rows else at
                same(value, stages[name][rows], f"{name} of tokens {at[0]} …", case.finite)


def same(got: Array, want: Array, what: str, finite: bool = False) -> None:
    """Equal shape, dtype and bits, but for the bits of a NaN; says where the first difference
    lies. ``finite``: of numbers that are not finite, only that they are not."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype), what
    equal = np.ascontiguousarray(got).view(np.uint32) == np.ascontiguousarray(want).view(np.uint32)
    if got.dtype == np.float32 and not equal.all():
        equal |= (
            ~(np.isfinite(got) | np.isfinite(want)) if finite else np.isnan(got) & np.isnan(want)
        )
    if not equal.all():
        at = tuple(map(int, np.argwhere(~equal)[0]))
        differ = f"{(~equal).sum()} of {equal.size} differ"
        raise AssertionError(
            f"{what}: {differ}, first at {at}: {got[at]!r} instead of {want[at]!r}; seed {SEED}"
        )


def matrix(cases: Iterable[Case], ways: Iterable[str]) -> Iterator[tuple[Case, str]]:
    """Which case is run in which ways."""
    for case in cases:
        for way in ways:
            variant = next((v for v in VARIANTS if way.endswith(v)), None)
            if not way.startswith(case.not_on) and (variant is None or variant in case.also):
                yield case, way


def refusal(case: Case, way: str) -> str | None:
    """What a way has to say that does not support a case."""
    return next((s for begin, s in case.unsupported.items() if way.startswith(begin)), None)


def seconds(case: Case, backend: Backend) -> float:
    """The median time of the last pass of the first cutting, which was checked before."""
    _, batch = specified(case)[0].passes[0][-1]
    backend.run(batch)
    taken: list[float] = []
    while len(taken) < 5 or (sum(taken) < 0.5 and len(taken) < 1000):
        start = time.perf_counter()
        backend.run(batch)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)
