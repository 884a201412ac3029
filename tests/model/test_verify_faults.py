"""Planted faults: verify names the stage and the layer, and calls nothing else faulty."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import isobit
from isobit.backends.cpu import CpuBackend
from isobit.backends.reference import ReferenceBackend
from isobit.errors import NothingCompared, UsageError
from isobit.model.stages import ON_REQUEST, all_stages
from isobit.runtime.model import Model
from isobit.verify.compare import compare
from isobit.verify.diff import Diff
from isobit.verify.faults import (
    FAULTS,
    ChangedStage,
    changed_weight,
    one_ulp,
    plant,
    with_backend,
)
from isobit.verify.graph_faults import GRAPH_FAULTS, partner, rewritten
from isobit.verify.trace import ModelRun, record
from isobit.verify.trace_file import Trace
from isobit.verify.verify import open_replay, verify
from tests.helpers.synth import Geometry, write_model
from tests.model.accuracy import Accuracy
from tests.model.oracle import Oracle

IDS = [1138, 550, 1754, 65, 404, 565]
STAGES = [s for s in all_stages(moe=True) if s not in ON_REQUEST]


@pytest.fixture(scope="module")
def clean() -> Iterator[Model]:
    with isobit.load("sample", "reference") as model:
        yield model


def found(faulty: Model, clean: Model) -> Diff:
    with faulty:
        return verify(faulty, ModelRun(clean), IDS)


def places(diff: Diff) -> list[tuple[str, int | None]]:
    """What is faulty, in graph order; the rest of what differs must be propagated."""
    rest = [s for s in diff.stages if not s.distance.identical and s not in diff.faulty]
    assert all(s.origin == "propagated" for s in rest)
    assert all(s.origin is None for s in diff.stages if s.distance.identical)
    return [(s.stage, s.layer) for s in diff.faulty]


def place(stage: str, layer: int) -> tuple[str, int | None]:
    whole = stage in ("embedding", "final_norm", "lm_head")
    return stage, None if whole else layer


@pytest.mark.parametrize("stage", [s for s in STAGES if s != "moe_router_indices"])
def test_one_ulp(stage: str, clean: Model, rng: np.random.Generator) -> None:
    where = place(stage, int(rng.integers(clean.config.n_layers)))
    faulty = with_backend(clean, lambda w, e: ChangedStage(w, e, *where, one_ulp(rng)))
    diff = found(faulty, clean)
    assert places(diff) == [where]
    assert diff.first is not None
    assert (diff.first.stage, diff.first.layer) == where
    d = diff.first.distance
    assert (d.differing, d.max_ulp) == (1, 1)
    assert not diff.identical


MORE = {
    "rope-off-by-one": ["k_post_rope"],
    "int8-activations": ["attn_out", "moe_expert_gate", "moe_expert_up", "moe_expert_out"],
    "norm-after-rope": ["k_post_rope"],
    "rope-base": ["k_post_rope"],
    "rope-pairs": ["k_post_rope"],
}
WEIGHED = ["attn_norm", "qkv_matmul", "q_post_rope", "k_post_rope", "attn_out", "ffn_norm"]
WEIGHED += ["moe_router_logits", "moe_expert_gate", "moe_expert_up", "moe_expert_out"]
"""Stages that are faulty besides the first."""


@pytest.mark.parametrize("name", FAULTS)
def test_planted(name: str, clean: Model, rng: np.random.Generator) -> None:
    layer = int(rng.integers(clean.config.n_layers))
    planted = plant(name, layer, rng)
    diff = found(with_backend(clean, planted.make), clean)
    if name == "swapped-layers":  # all that has tensors, in both
        both = sorted([layer, partner(layer)])
        assert places(diff) == [(s, i) for i in both for s in WEIGHED]
        assert places(diff)[0] == planted.place
    else:
        assert places(diff) == [planted.place, *((s, layer) for s in MORE.get(name, []))]
    assert diff.first is diff.faulty[0]
    here = [c for c in diff.router if c.layer == layer]
    if name == "wrong-expert":
        assert [(c.position, c.cause) for c in here] == [(len(IDS) - 1, "selection")]
        assert len(here[0].only_a) == len(here[0].only_b) == 1
    if name in ("dropped-expert", "uniform-router", "swapped-ranks"):
        assert not here
    if name == "swapped-ranks":
        assert diff.router_reordered >= 1
    if name == "reordered-sum":
        assert diff.first.distance.differing > 100


@pytest.mark.parametrize("name", GRAPH_FAULTS)
def test_a_wrong_graph_is_seen_by_the_oracle_that_has_none(
    name: str, clean: Model, rng: np.random.Generator, sample_oracle: Oracle, heldout: list[int]
) -> None:
    """Fed the same wrong graph, backends agree with each other to the bit: no parity sees it."""
    ids = heldout[:48]
    expected = sample_oracle.run(ids)
    layer = int(rng.integers(clean.config.n_layers))
    found = []
    for make in (ReferenceBackend, CpuBackend):
        if name == "rope-pairs" and make is CpuBackend:
            continue  # an operation of this test's own, which no compiled backend has
        with with_backend(clean, lambda w, e, m=make: m(rewritten(w, name, layer), e)) as wrong:
            found.append(wrong.logits(ids))
    assert all((x.view(np.int32) == found[0].view(np.int32)).all() for x in found)
    kl = Accuracy.of(expected, found[0], expected.experts).mean_kl
    right = Accuracy.of(expected, clean.logits(ids), expected.experts).mean_kl
    print(f"layer {layer}: mean KL {kl:.3g} with the fault, {right:.3g} without")
    assert right <= 1e-4 < kl  # the bound of tests/model/test_accuracy.py


@pytest.mark.parametrize(
    ("role", "stage"),
    [("attn_q", "qkv_matmul"), ("attn_output", "attn_out"), ("ffn_gate_inp", None)],
)
def test_flipped_weight_bit(
    role: str, stage: str | None, clean: Model, rng: np.random.Generator
) -> None:
    layer = int(rng.integers(clean.config.n_layers))

    def flip(data: NDArray[np.uint8]) -> None:
        w = clean.graph.weights[f"blk.{layer}.{role}.weight"]
        block = int(rng.integers(data.size // w.format.block_bytes))
        byte = 16 if w.format.block_size > 1 else 2  # a code; a float's middle mantissa
        data[block * w.format.block_bytes + byte] ^= 4

    faulty = with_backend(
        clean,
        lambda w, e: ReferenceBackend(changed_weight(w, f"blk.{layer}.{role}.weight", flip), e),
    )
    assert places(found(faulty, clean)) == [(stage or "moe_router_logits", layer)]


@pytest.mark.parametrize("chunk", [1, 3, 512])
def test_a_clean_pair_is_clean(chunk: int, clean: Model) -> None:
    with isobit.load("sample", "reference") as other:
        other.engine = dataclasses.replace(other.engine, chunk=chunk)
        diff = verify(other, ModelRun(clean), IDS)
    assert diff.identical
    assert diff.first is None
    assert places(diff) == []
    assert len(diff.stages) == 139
    assert diff.router_rows == 8 * len(IDS)
    assert (diff.router_changed, diff.argmax_changed, diff.mean_kl) == (0, 0, 0.0)
    assert diff.stages[-1].distance.values == len(IDS) * clean.config.vocab


def test_some_layers_alone_are_reported_and_replayed_all_the_same(
    clean: Model, rng: np.random.Generator
) -> None:
    planted = plant("int8-activations", 3, rng)
    with with_backend(clean, planted.make) as faulty:
        diff = verify(faulty, ModelRun(clean), IDS, range(4, 6))
    assert {s.layer for s in diff.stages} == {None, 4, 5}
    assert diff.router_rows == 2 * len(IDS)
    assert diff.first is not None
    assert (diff.first.stage, diff.first.layer, diff.first.origin) == ("attn_norm", 4, "propagated")
    assert places(diff) == []


def test_a_fault_in_b_is_not_blamed_on_a(clean: Model, rng: np.random.Generator) -> None:
    faulty = with_backend(clean, lambda w, e: ChangedStage(w, e, "attn_norm", 2, one_ulp(rng)))
    with faulty:
        diff = verify(clean, ModelRun(faulty), IDS)
    assert [(s.stage, s.layer, s.origin) for s in diff.faulty] == [("attn_norm", 2, "faulty in B")]


def test_faults_in_saved_traces(clean: Model, tmp_path: Path, rng: np.random.Generator) -> None:
    """The other way: two files and the model."""
    faulty = with_backend(clean, lambda w, e: ChangedStage(w, e, "ffn_norm", 6, one_ulp(rng)))
    with faulty:
        record(faulty, IDS).save(tmp_path / "a")
    record(clean, IDS).save(tmp_path / "b")
    a, b = Trace.load(tmp_path / "a"), Trace.load(tmp_path / "b")
    assert places(compare(a, b, replay=open_replay("sample", b.manifest))) == [("ffn_norm", 6)]
    assert compare(b, b).identical


def test_nan_is_seen_and_does_not_crash(clean: Model) -> None:
    def poison(value: NDArray[Any]) -> None:
        value[2, 5] = np.nan

    faulty = with_backend(clean, lambda w, e: ChangedStage(w, e, "attn_out", 1, poison))
    diff = found(faulty, clean)
    assert diff.first is not None
    assert (diff.first.stage, diff.first.layer) == ("attn_out", 1)
    assert diff.first.distance.nonfinite_a == 1
    assert diff.first.origin == "faulty"
    diff.to_json()


def silent(clean: Model) -> Model:
    """A backend that never gives the stage attention."""

    class Silent(ChangedStage):
        def compute_logits(self, batch, tap, stages):  # type: ignore[no-untyped-def]
            return super().compute_logits(batch, tap, stages - {"attention"})

    return with_backend(clean, lambda w, e: Silent(w, e, "attention", 0, lambda _: None))


@pytest.mark.parametrize("layers", [range(8, 9), range(0), range(-1, 2), range(0, 10**12, 98)])
def test_layers_that_there_are_not_are_an_error(layers: range, clean: Model) -> None:
    """What was left, embedding and logits, agreed, and that was all."""
    with isobit.load("sample", "cpu") as other:
        for call in (
            lambda: verify(other, ModelRun(clean), IDS, layers),
            lambda: record(other, IDS, layers=layers),
        ):
            with pytest.raises(UsageError, match=r"^layers: expected some of 0 to 7, got range"):
                call()


def test_a_missing_stage_is_an_error(clean: Model) -> None:
    with pytest.raises(NothingCompared, match=r"^attention of layer 0: .* attn_out of layer 0$"):
        found(silent(clean), clean)


def test_a_stage_that_both_leave_out_is_an_error(clean: Model) -> None:
    with silent(clean) as other, pytest.raises(NothingCompared, match=r"^attention of layer 0"):
        verify(other, ModelRun(silent(clean)), IDS)
    with silent(clean) as other, pytest.raises(NothingCompared, match=r"^attention of layer 0"):
        record(other, IDS)


def test_a_run_that_ends_early_is_an_error(clean: Model) -> None:
    class Short(ModelRun):
        def run(self, tokens, *others, **more):  # type: ignore[no-untyped-def]
            super().run(tokens[:-1], *others, **more)

    with isobit.load("sample", "reference") as other:
        with pytest.raises(NothingCompared, match=r"^embedding: expected values of 6 tokens"):
            verify(other, Short(clean), IDS)
        with pytest.raises(NothingCompared, match=r"^embedding: .* 6 tokens, got 5"):
            record(Short(clean), IDS)


def test_a_backend_that_fails_ends_the_run(clean: Model) -> None:
    def fail(_: NDArray[Any]) -> None:
        raise MemoryError("planted")

    faulty = with_backend(clean, lambda w, e: ChangedStage(w, e, "attn_out", 3, fail))
    with pytest.raises(MemoryError, match="planted"):
        found(faulty, clean)


def test_one_token_is_compared(clean: Model) -> None:
    faulty = with_backend(clean, plant("wrong-expert", 2, np.random.default_rng(0)).make)
    with faulty:
        diff = verify(faulty, ModelRun(clean), IDS[:1])
    assert (diff.first and diff.first.where) == "moe_router_indices of layer 2"
    assert any("attention is trivial" in note for note in diff.notes)


def test_a_fault_that_a_model_has_no_place_for_is_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = write_model(tmp_path / "dense.gguf", Geometry(experts=0), seed=1)
    with isobit.load(path, "reference") as dense:
        for name in ("one-ulp-swiglu", "swapped-sub-scales", "reordered-sum"):
            with pytest.raises(UsageError, match="expected a"):
                with_backend(dense, plant(name, 0, rng).make)


def test_a_fault_shows_in_the_first_stage_behind_its_place_that_is_shown(clean: Model) -> None:
    """In no other, where a model has no such place."""
    graph, rng = clean.graph, np.random.default_rng(0)
    fault, everything = plant("one-ulp-norm", 1, rng), frozenset(graph.names)
    assert fault.shows_in(graph, everything) == ("attn_norm", 1)
    assert fault.shows_in(graph, everything - {"attn_norm"}) == ("qkv_matmul", 1)
    elsewhere = plant("one-ulp-norm", clean.config.n_layers, rng)
    assert elsewhere.shows_in(graph, everything) == elsewhere.place
