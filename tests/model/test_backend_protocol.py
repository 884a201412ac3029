"""What every backend offers: results of all kinds, one check of a batch, greedy steps, taps."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from isobit.backend_names import BACKENDS
from isobit.backends import open_backend
from isobit.backends.base import CHOSEN, HIDDEN, Backend, Batch, Wanted, by_sequence
from isobit.backends.base.batch import field_values
from isobit.backends.base.draws import ADJUSTED, OCCURRED, Adjusted, Draws
from isobit.backends.cpu.sampler import Columns, Row
from isobit.config import EngineConfig
from isobit.errors import BackendUnavailable, UsageError
from isobit.gguf.formats import FORMATS
from isobit.gguf.reader import GGUFFile
from isobit.model.weights import Weights
from isobit.numerics import Weight, log_softmax, top_logprobs
from isobit.numerics.digest import tree_digest
from tests.helpers.expected import not_run
from tests.helpers.passes import i32, same_bits
from tests.helpers.synth import Geometry, write_model

ENGINE = EngineConfig(context=192, max_sequences=2, threads=2)
RNG = np.random.default_rng(0)
BAD = 7
"""A token whose embedding is no number."""
PAGES = i32([[0, 3], [4, 2]])


def damaged(weights: Weights) -> Weights:
    """The same model with one row of the embedding that is not finite."""
    (op,) = (op for op in weights.graph.ops if op.kind == "embedding")
    rows = op.weights[0].float32().copy()
    rows[BAD, 5] = np.nan
    f32 = next(f for f in FORMATS.values() if f.name == "F32")
    weight = Weight(op.weights[0].name, f32, rows.shape, rows.view(np.uint8).ravel())
    return Weights(weights.config, weights.graph.with_weights({weight.name: weight}))


@pytest.fixture(scope="module", params=BACKENDS)
def backend(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Backend]:
    path = write_model(tmp_path_factory.mktemp("model") / "m.gguf", Geometry(), seed=1)
    with GGUFFile.open(path) as file:
        try:
            opened = open_backend(request.param, damaged(Weights.from_file(file)), ENGINE)
        except (BackendUnavailable, ImportError) as error:
            not_run(request.param, f"backend {request.param}: {error}")
        yield opened
        opened.close()


def batch_of(rng: np.random.Generator, first: int = 70, second: int = 5) -> Batch:
    """Two sequences from their beginning, without the bad token; some rows, in no order."""
    tokens = rng.integers(BAD + 1, 300, first + second).astype(np.int32)
    return Batch(
        tokens,
        i32([*range(first), *range(second)]),
        i32([0] * first + [1] * second),
        PAGES,
        i32([first + second - 1, 3, first - 1, 64, 3]),
    )


def draws_of(rng: np.random.Generator, count: int = 5, **more: Any) -> Draws:
    """A draw of each row, every one with other settings."""
    each = [
        Row(t, k, p, m, int(rng.integers(1 << 62)), int(rng.integers(1, 99)))
        for t, k, p, m in zip(
            rng.choice([0, 0.7, 1, 30], count).tolist(),
            rng.choice([0, 5, 200], count).tolist(),
            rng.choice([1, 0.8], count).tolist(),
            rng.choice([0, 1e-3], count).tolist(),
            strict=True,
        )
    ]
    index = np.array([row.index for row in each], np.uint64)
    fixed = {"rows": np.arange(count, dtype=np.int32), "logprobs": True, **more}
    return Draws(columns=Columns.of(each, 320), index=index, **fixed)


def test_capabilities(backend: Backend) -> None:
    assert backend.device
    assert not backend.inexact
    assert backend.limits.positions == 192
    assert (backend.limits.vocabulary, backend.limits.pages) == (320, 6)
    memory = backend.memory()
    assert memory is None or 0 < memory.free <= memory.total


@pytest.mark.parametrize("some", [True, False, None])
def test_results_are_those_of_the_logits(
    backend: Backend, rng: np.random.Generator, some: bool | None
) -> None:
    batch = batch_of(rng)
    logits = backend.forward(batch)
    given = rng.integers(0, 320, (5, 3)).astype(np.int32)
    some_rows = i32([4, 0])
    wanted = Wanted(
        some_rows if some is None else some, argmax=True, top=4, given=given, hidden=True
    )
    found = backend.run(batch, wanted)
    assert found.finite.tolist() == [True] * 5
    if some is False:
        assert found.logits is None
    else:
        assert found.logits is not None
        assert same_bits(found.logits, logits if some else logits[some_rows])
    ids, top = top_logprobs(logits, 4)
    assert found.argmax is not None
    assert found.top_ids is not None
    assert found.argmax.tolist() == logits.argmax(1).tolist()
    assert found.top_ids.tolist() == ids.tolist()
    assert found.top is not None
    assert found.given is not None
    assert same_bits(found.top, top)
    assert same_bits(found.given, np.take_along_axis(log_softmax(logits), given, axis=1))


def test_each_result_alone(backend: Backend, rng: np.random.Generator) -> None:
    batch = batch_of(rng)
    given, drawn = rng.integers(0, 320, (5, 1)).astype(np.int32), draws_of(rng)
    every = Wanted(
        argmax=True, top=3, given=given, drawn=drawn, hidden=True, digests=True, routes=True
    )
    whole = backend.run(batch, every)
    nothing = Wanted(logits=False)
    for wanted, names in (
        (replace(nothing, argmax=True), {"argmax"}),
        (replace(nothing, top=3), {"top", "top_ids"}),
        (replace(nothing, given=given), {"given"}),
        (replace(nothing, drawn=drawn), {"drawn", "drawn_logprobs"}),
        (replace(nothing, hidden=True), {"hidden"}),
        (replace(nothing, digests=True), {"digests"}),
        (replace(nothing, routes=True), {"routes"}),
        (Wanted(), {"logits"}),
    ):
        found = backend.run(batch, wanted)
        for name, value in field_values(found).items():
            if name in names:
                assert value.tobytes() == field_values(whole)[name].tobytes(), name
            elif name != "finite":
                assert value is None, name
        assert found.finite.tolist() == [True] * 5


def test_draws_are_those_of_the_logits(backend: Backend, rng: np.random.Generator) -> None:
    """In a pass and in a step, beside logits of all, some or no rows, in any order, with
    penalties and what is allowed."""
    batch = batch_of(rng)
    ids = [3, 50, 9, 77, 319, 0, 4]
    biases = (rng.standard_normal(7) * 9).tolist()
    seen = [0, OCCURRED, OCCURRED + 1, OCCURRED + 9, 0, OCCURRED, OCCURRED + 2]
    made = np.array(list(zip([0] * 7, ids, biases, seen, strict=True)), ADJUSTED)
    adjusted = [(1, Adjusted(made, 1.3, 0.5, -0.2))]
    masks = rng.integers(0, 1 << 32, (5, 10), dtype=np.uint32)
    held = [(i, partial(np.copyto, src=masks[i])) for i in (0, 1)]
    each = i32([0, 1])
    step = Batch(i32([9, 11]), i32([70, 5]), each, PAGES, each)
    for now in (batch, step):
        logits = backend.forward(now)
        n = len(logits)
        for more in ({}, {"held": held}, {"adjusted": adjusted, "held": held[:1]}):
            rows = rng.permutation(n)[: rng.integers(2, n + 1)].astype(np.int32)
            drawn = draws_of(rng, len(rows), rows=rows, **more)
            tokens, logprobs = drawn.choose(backend.rows, logits[rows])
            for some in (False, True, i32([n - 1]), rows[::-1].copy()):
                found = backend.run(now, Wanted(some, argmax=True, drawn=drawn))
                assert found.drawn is not None
                assert found.drawn_logprobs is not None
                assert found.drawn.tolist() == tokens.tolist()
                assert found.argmax is not None
                assert found.argmax.tolist() == logits.argmax(1).tolist()
                assert logprobs is not None
                assert same_bits(found.drawn_logprobs, logprobs)
                if some is False:
                    assert found.logits is None
                else:
                    assert found.logits is not None
                    assert same_bits(found.logits, logits if some is True else logits[some])


def test_digests_and_experts(backend: Backend, rng: np.random.Generator) -> None:
    batch = batch_of(rng)
    seen: list[NDArray[np.generic]] = []
    logits = backend.forward(batch, lambda _s, _l, v: seen.append(np.array(v)), frozenset({CHOSEN}))
    for tap, stages in ((None, None), (lambda *_: None, frozenset({"embedding", CHOSEN}))):
        found = backend.run(batch, Wanted(False, digests=True, routes=True), tap, stages)
        assert found.digests is not None
        assert found.routes is not None
        assert [d.tobytes() for d in found.digests] == [tree_digest(z.tobytes()) for z in logits]
        assert found.routes.dtype == backend.no_routes.dtype == np.uint8
        assert found.routes.shape[1:] == backend.no_routes.shape[1:] == (2, 2)
        assert np.array_equal(found.routes, np.stack(seen, axis=1))


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_many_experts(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    path = write_model(tmp_path / "m.gguf", Geometry(layers=1, experts=300), seed=2)
    with GGUFFile.open(path) as file:
        backend = open_backend(name, Weights.from_file(file), ENGINE)
        batch, seen = batch_of(rng), []
        wanted = Wanted(False, routes=True)
        found = backend.run(
            batch, wanted, lambda _s, _l, v: seen.append(np.array(v)), frozenset({CHOSEN})
        )
        assert found.routes is not None
        assert found.routes.dtype == np.int16
        assert found.routes.max() > 255
        assert np.array_equal(found.routes, np.stack(seen, axis=1))
        backend.close()


def test_hidden_rows_are_the_stage_that_the_head_reads(
    backend: Backend, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, seen = batch_of(rng), {}
    asked = frozenset({"final_norm"})  # by name: a captured step keeps it from other traces
    backend.forward(batch, lambda s, _, v: seen.update({s: np.array(v)}), asked)
    for tap, stages in (
        (None, None),
        (lambda *_: None, frozenset({"lm_head"})),
        (lambda *_: None, None),
    ):
        found = backend.run(batch, Wanted(logits=False, hidden=True), tap, stages).hidden
        assert found is not None
        assert same_bits(found, seen["final_norm"][batch.logit_rows])
    taps, compute = [], backend.compute
    monkeypatch.setattr(backend, "compute", lambda *a: taps.append(a[2]) or compute(*a))
    backend.run(batch, HIDDEN)
    assert taps == [None]
    names = []
    wanted = Wanted(logits=False, hidden=True)
    backend.run(batch, wanted, lambda s, *_: names.append(s), frozenset({"lm_head", "embedding"}))
    assert names == ["embedding", "lm_head"]


def test_one_sequence_that_is_not_finite_spoils_no_other(
    backend: Backend, rng: np.random.Generator
) -> None:
    clean = batch_of(rng)
    dirty = replace(clean, tokens=np.where(clean.sequence == 1, BAD, clean.tokens).astype(np.int32))
    given = np.zeros((5, 1), np.int32)
    wanted = Wanted(argmax=True, top=2, given=given, drawn=draws_of(rng), hidden=True, digests=True)
    good, found = backend.run(clean, wanted), backend.run(dirty, wanted)
    assert found.finite.tolist() == [False, True, True, True, True]
    for name, value in field_values(found).items():
        if name not in ("finite", "routes"):
            assert value[1:].tobytes() == field_values(good)[name][1:].tobytes(), name
    assert found.argmax is not None
    assert found.top_ids is not None
    assert found.drawn is not None
    assert found.drawn_logprobs is not None
    assert (found.argmax[0], found.top_ids[0].tolist()) == (-1, [-1, -1])
    assert found.drawn[0] == -1
    assert np.isnan(found.drawn_logprobs[0])
    assert found.top is not None
    assert found.given is not None
    assert np.isnan(found.top[0]).all()
    assert np.isnan(found.given[0]).all()
    assert (
        backend.run(dirty, Wanted(logits=False, hidden=True)).finite.tolist()
        == [False] + [True] * 4
    )


def test_greedy_is_step_by_step(backend: Backend, rng: np.random.Generator) -> None:
    batch = batch_of(rng)
    backend.forward(batch)
    expected = []
    token, at, each = i32([9, 11]), i32([70, 5]), i32([0, 1])
    for step in range(4):
        logits = backend.forward(Batch(token, at + i32([step]), each, PAGES, each))
        token = logits.argmax(1).astype(np.int32)
        expected.append(token.tolist())
    assert backend.greedy(i32([9, 11]), at, PAGES, 4).tolist() == expected
    alone = backend.greedy(i32([9]), at[:1], PAGES[:1], 4)
    assert alone[:, 0].tolist() == [row[0] for row in expected]
    broken = backend.greedy(i32([9, BAD]), at, PAGES, 4)
    assert broken[:, 0].tolist() == [row[0] for row in expected]
    assert broken[:, 1].tolist() == [-1] * 4
    for tokens, count in ((i32([9, 11]), 0), (i32([9, 11]), 59), (i32([9, 320]), 1)):
        with pytest.raises(UsageError):
            backend.greedy(tokens, at, PAGES, count)


def test_taps_by_sequence(backend: Backend, rng: np.random.Generator) -> None:
    batch, whole, parts = batch_of(rng), {}, {}
    backend.forward(batch, lambda s, i, v: whole.update({(s, i): np.array(v)}))
    taps = {1: lambda s, i, v: parts.update({(s, i): np.array(v)})}
    backend.forward(batch, by_sequence(backend.graph, batch, taps))
    assert list(parts) == list(whole)
    for key, value in parts.items():
        rows = [0] if key == ("lm_head", None) else range(70, 75)
        assert value.tobytes() == whole[key][rows].tobytes(), key


Change = Callable[[Batch], Batch]


def put(name: str, value: object) -> Change:
    return lambda b: replace(b, **{name: value})


def with_first(name: str, value: int) -> Change:
    def change(b: Batch) -> Batch:
        array = field_values(b)[name].copy()
        array.reshape(-1)[0] = value
        return replace(b, **{name: array})

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_first("tokens", -1), "tokens: expected 0 to 319, got -1"),
        (with_first("tokens", 320), "tokens: expected 0 to 319, got 320"),
        (with_first("positions", -1), "positions: expected 0 to 127, got -1"),
        (put("positions", i32(range(120, 195))), "positions: expected 0 to 127, got 128"),
        (put("sequence", i32([2] * 75)), "sequence: expected 0 to 1, got 2"),
        (put("sequence", i32([0, 1] * 37 + [0])), "sequence: expected its tokens together"),
        (with_first("positions", 7), "positions: expected 8 next in the sequence, got 1"),
        (with_first("pages", -1), "pages: expected 0 to 5, got -1"),
        (put("pages", i32([[0, 3], [4, 6]])), "pages: expected 0 to 5, got 6"),
        (put("pages", i32([[0, 3], [4, -1]])), "pages: expected 0 to 5, got -1"),
        (put("pages", i32([0, 1])), "pages: expected 2 dimensions, got 1"),
        (put("pages", np.zeros((2, 9), np.int32)[:, ::3]), "pages: expected a contiguous array"),
        (put("tokens", np.zeros(75, np.int64)), "tokens: expected int32, got another type"),
        (put("tokens", np.zeros(75, np.float32)), "tokens: expected int32, got another type"),
        (put("tokens", i32([9])), "tokens: expected at least one, and as many positions"),
        (with_first("logit_rows", 75), "logit_rows: expected 0 to 74, got 75"),
        (with_first("logit_rows", -1), "logit_rows: expected 0 to 74, got -1"),
    ],
)
def test_a_wrong_batch_is_refused(
    backend: Backend, rng: np.random.Generator, change: Change, message: str
) -> None:
    with pytest.raises(UsageError, match=f"^batch {message}"):
        backend.run(change(batch_of(rng)))


def test_an_empty_batch_is_refused(backend: Backend) -> None:
    none = np.empty(0, np.int32)
    with pytest.raises(UsageError, match="expected at least one"):
        backend.run(Batch(none, none, none, PAGES, none))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Wanted(top=-1), "top: expected 0 or more, got -1"),
        (Wanted(given=i32([[320]] * 5)), "given: expected 0 to 319, got 320 to 320"),
        (Wanted(given=i32([[0]])), r"given: expected int32 \[5, 1\], got int32 \[1, 1\]"),
        (
            Wanted(drawn=draws_of(RNG, 2, rows=i32([4, 5]))),
            "drawn rows: expected 0 to 4, got 4 to 5",
        ),
        (Wanted(drawn=draws_of(RNG, 2, rows=i32([4, 4]))), "drawn rows: expected each once"),
        (Wanted(logits=i32([5])), "logits: expected 0 to 4, got 5 to 5"),
        (Wanted(logits=np.zeros(1, np.int64)), r"logits: expected int32 \[1\], got int64 \[1\]"),
    ],
)
def test_what_cannot_be_wanted_is_refused(
    backend: Backend, rng: np.random.Generator, wanted: Wanted, message: str
) -> None:
    with pytest.raises(UsageError, match=f"^wanted {message}"):
        backend.run(batch_of(rng), wanted)


def test_more_than_the_vocabulary_is_all_of_it(backend: Backend, rng: np.random.Generator) -> None:
    found = backend.run(batch_of(rng), Wanted(logits=False, top=1000))
    assert found.top_ids is not None
    assert found.top_ids.shape == (5, 320)
