"""The same tokens give the same bits, however they are cut into passes and wherever they are kept.

Every comparison is of bit patterns. Each backend is held to itself here, and the others to the
reference in test_parity.py.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from isobit.backends.base import F32, Backend, Batch
from isobit.model.stages import ON_REQUEST, all_stages
from tests.helpers import passes
from tests.helpers.passes import i32, run, same_bits
from tests.helpers.synth import Q4_K_M, Geometry, all_in, write_model

N = 135  # positions in three tiles, the last of them part full

MODELS = {
    "Q4_K_M": (Geometry(), Q4_K_M),
    "Q8_0, ragged": (
        Geometry(hidden=96, heads=3, kv_heads=1, head_dim=32, ffn=160),
        all_in("Q8_0"),
    ),
    "dense Q5_K, tied": (Geometry(experts=0, tied=True), all_in("Q5_K")),
    "Q3_K, F16 ends": (
        Geometry(experts=5, experts_used=3, layers=1),
        {"": "Q3_K", "ffn_gate_inp": "F16", "token_embd": "F16", "output": "F16"},
    ),
}
CASES = [
    ("Q4_K_M", 2),
    ("Q4_K_M", 1),
    ("Q8_0, ragged", 2),
    ("dense Q5_K, tied", 1),
    ("Q3_K, F16 ends", 2),
]


@pytest.fixture(scope="module")
def ids() -> list[int]:
    seed = np.random.SeedSequence().generate_state(1)[0]
    print(f"seed {seed}")
    return np.random.default_rng(seed).integers(0, 300, N).tolist()


@pytest.fixture(scope="module", params=passes.BACKENDS)
def backend_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(
    scope="module", params=CASES, ids=[f"{model}-planes{planes}" for model, planes in CASES]
)
def backend(
    request: pytest.FixtureRequest, backend_name: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Backend]:
    name, planes = request.param
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    write_model(path, *MODELS[name], seed=3)
    with passes.backend_of(path, backend_name, planes) as opened:
        yield opened


@pytest.fixture(scope="module")
def whole(backend: Backend, ids: list[int]) -> F32:
    """The logits of all tokens run in one pass."""
    logits = run(backend, ids)
    assert np.isfinite(logits).all()
    return logits


@pytest.mark.parametrize("chunk", [7, 64])
def test_chunks(chunk: int, backend: Backend, ids: list[int], whole: F32) -> None:
    assert same_bits(run(backend, ids, chunk=chunk), whole)


def test_token_by_token(backend: Backend, ids: list[int], whole: F32) -> None:
    assert same_bits(run(backend, ids[:70], chunk=1), whole[:70])


def test_prefill_then_decode(backend: Backend, ids: list[int], whole: F32) -> None:
    run(backend, ids[:120])
    assert same_bits(run(backend, ids[120:], start=120, chunk=1), whole[120:])


def test_pages_anywhere(backend: Backend, ids: list[int], whole: F32) -> None:
    assert same_bits(run(backend, ids, chunk=40, pages=i32([[5, 0, 3]])), whole)


def test_reused_pages(backend: Backend, ids: list[int], whole: F32) -> None:
    """What an earlier sequence left behind the last position is not seen."""
    run(backend, ids[::-1])
    assert same_bits(run(backend, ids, chunk=7), whole)


def test_shared_prefix(backend: Backend, ids: list[int], whole: F32) -> None:
    """Another sequence may go on from the full pages of this one."""
    run(backend, ids, pages=i32([[0, 1, 2]]))
    other = run(backend, ids[64:], start=64, pages=i32([[0, 4, 3]]))
    assert same_bits(other, whole[64:])


def test_two_sequences_in_one_pass(backend: Backend, ids: list[int], whole: F32) -> None:
    first, second = ids[:70], ids[30:]
    alone = run(backend, second)
    batch = Batch(
        tokens=i32(first + second),
        positions=i32([*range(len(first)), *range(len(second))]),
        sequence=i32([1] * len(first) + [0] * len(second)),
        pages=i32([[4, 1], [0, 3]]),
        logit_rows=i32(range(len(first) + len(second))),
    )
    logits = backend.forward(batch)
    assert same_bits(logits[: len(first)], whole[: len(first)])
    assert same_bits(logits[len(first) :], alone)


def test_one_prefills_while_another_decodes(backend: Backend, ids: list[int], whole: F32) -> None:
    run(backend, ids[:99], pages=i32([[0, 1]]))
    batch = Batch(
        tokens=i32([ids[99], *ids[:65]]),
        positions=i32([99, *range(65)]),
        sequence=i32([0] + [1] * 65),
        pages=i32([[0, 1], [2, 3]]),
        logit_rows=i32(range(66)),
    )
    logits = backend.forward(batch)
    assert same_bits(logits[:1], whole[99:100])
    assert same_bits(logits[1:], whole[:65])


def test_some_logits(backend: Backend, ids: list[int], whole: F32) -> None:
    """Rows that are not asked for are not returned, and asking for fewer changes none."""
    for rows in ([N - 1], [], [3, 70, 0]):
        batch = Batch(i32(ids), i32(range(N)), i32([0] * N), passes.page_table(N), i32(rows))
        assert same_bits(backend.forward(batch), whole[rows])


def test_taps_change_nothing(backend: Backend, ids: list[int], whole: F32) -> None:
    seen: set[str] = set()
    logits = run(backend, ids, tap=lambda stage, *_: seen.add(stage))
    assert same_bits(logits, whole)
    assert seen in (set(all_stages(moe=m)) - ON_REQUEST for m in (True, False))


def test_a_different_token_changes_what_follows(
    backend: Backend, ids: list[int], whole: F32
) -> None:
    """The comparisons above could not fail if the logits did not depend on the tokens."""
    changed = [*ids[:10], (ids[10] + 1) % 300, *ids[11:]]
    logits = run(backend, changed)
    assert same_bits(logits[:10], whole[:10])
    assert all((a != b).any() for a, b in zip(logits[10:], whole[10:], strict=True))


def test_planes_matter(backend_name: str, ids: list[int], tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf")
    with (
        passes.backend_of(path, backend_name, 1) as one,
        passes.backend_of(path, backend_name, 2) as two,
    ):
        a, b = run(one, ids[:20]), run(two, ids[:20])
    assert all((x != y).any() for x, y in zip(a, b, strict=True))
