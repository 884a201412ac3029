"""Taking measures: each passes on a right backend, fails on one with a planted fault, and is not
run, never passed, where something is missing."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from isobit.backends.base import Backend
from isobit.backends.reference import ReferenceBackend
from isobit.contracts import measuring
from isobit.contracts.check import check
from isobit.contracts.evidence import Result
from isobit.errors import BackendUnavailable
from isobit.verify import faults
from isobit.verify.faults import OneLayer, one_ulp
from tests.helpers.contracts import MEASURES, PROMPTS, Make, contract, measure, stage
from tests.helpers.synth import Geometry, write_model


def run(model: Path | str, *measures: str, **settings: Any) -> list[Result]:
    return check(contract(*measures), Path("thing-v1.yaml"), model, "cpu", **settings).results


@pytest.mark.parametrize("kind", MEASURES)
def test_a_right_backend_passes(kind: str, small_model: Path) -> None:
    measures = [measure(kind)] if kind != "throughput" else [measure("parity"), measure(kind)]
    if kind == "memory":
        measures.insert(0, measure("parity"))
    results = run(small_model, *measures)
    assert [r.outcome for r in results] == ["passed"] * len(measures), results
    assert set(results[-1].measure["threshold"]) <= set(results[-1].figures)


class Restless(ReferenceBackend):
    """Another last bit in every pass."""

    passes = 0

    def forward(self, batch, tap=None, stages=None):  # type: ignore[no-untyped-def]
        out = super().forward(batch, tap, stages)
        Restless.passes += 1
        out[0, Restless.passes] = np.nextafter(out[0, Restless.passes], np.float32(9))
        return out


class SingleTokens(OneLayer):
    """Goes wrong in passes of one token alone."""

    def hook(self, op, inputs, compute):  # type: ignore[no-untyped-def]
        many = len(inputs[0]) > 1
        return compute(op, inputs) if many else super().hook(op, inputs, compute)


class Greedy(ReferenceBackend):
    """Chooses token 0 where it keeps the logits to itself."""

    def greedy(self, tokens, _positions, _pages, count):  # type: ignore[no-untyped-def]
        return np.zeros((count, len(tokens)), np.int32)


def raise_another(logits: NDArray[Any]) -> None:
    logits[-1, logits[-1].argmax() - 1] = np.float32(1e9)


def poison(value: NDArray[Any]) -> None:
    value[-1, 0] = np.nan


def poison_top(logits: NDArray[Any]) -> None:
    logits[-1, logits[-1].argmax()] = np.nan


def negate(value: NDArray[Any]) -> None:
    np.negative(value, out=value)


def shrink(weights: NDArray[Any]) -> None:
    weights *= np.float32(0.9999)


FAULTS: list[tuple[str, Make, str]] = [
    ("parity", stage("attn_norm", 1, one_ulp(np.random.default_rng(0))), "differing_values is"),
    ("parity", stage("post_ffn_residual", 1, negate), "layers_below_cosine_0_99 is 1"),
    ("router_sets", stage("moe_router_indices", 1, faults._wrong_expert), "changed_sets is"),
    ("router_sets", stage("moe_router_indices", 0, faults._swap_ranks), "changed_orders is"),
    ("argmax", stage("lm_head", None, raise_another), "changed_prompts is 2"),
    ("argmax", stage("lm_head", None, poison_top), "changed_prompts is 2"),
    ("invariant", stage("moe_router", 1, shrink), "router_weight_deviation is 0.0001"),
    ("invariant", stage("attn_out", 0, poison), "nonfinite_values is"),
    ("determinism", Restless, "differing_values is"),
    ("determinism", lambda w, e: SingleTokens(w, e, 1, "swapped-kv"), "differing_values is"),
    ("kv_equivalence", lambda w, e: SingleTokens(w, e, 1, "rope-off-by-one"), "differing_values"),
    ("kv_equivalence", Greedy, "differing_values is"),
    (
        "accuracy",
        lambda w, e: ReferenceBackend(w, dataclasses.replace(e, activation_planes=1)),
        "mean_kl is",
    ),
]


@pytest.mark.parametrize(("kind", "make", "said"), FAULTS)
def test_a_planted_fault_fails(
    kind: str, make: Make, said: str, small_model: Path, on_cpu: Callable[[Make], None]
) -> None:
    on_cpu(make)
    [result] = run(small_model, measure(kind))
    assert result.outcome == "failing"
    assert said in result.reason
    assert "expected ≤" in result.reason or "expected ≥" in result.reason


def test_a_comparison_that_is_blind_fails(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "one_ulp", lambda _: np.copy)
    [result] = run(small_model, measure("fault_injection"))
    assert result.outcome == "failing"
    assert result.figures == {"missed_faults": 2.0, "misplaced_faults": 0.0}
    assert "one-ulp-norm in layer" in result.about["missed"][0]


def test_a_fault_in_the_backend_itself_is_misplaced(
    small_model: Path, on_cpu: Callable[[Make], None]
) -> None:
    on_cpu(stage("embedding", None, one_ulp(np.random.default_rng(0))))
    [result] = run(small_model, measure("fault_injection"))
    assert result.outcome == "failing"
    assert result.figures["misplaced_faults"] == 4


def test_all_faults_are_found_where_they_are(small_model: Path) -> None:
    [result] = run(
        small_model, measure("fault_injection").replace("[one-ulp-norm, swapped-kv]", "[all]")
    )
    assert result.outcome == "passed", result
    assert result.about["planted"] == 2 * len(faults.FAULTS)


@pytest.mark.parametrize(
    ("measures", "said"),
    [
        (["throughput"], "only after parity has passed"),
        (["argmax", "throughput"], "only after parity has passed"),
        (["throughput", "parity"], None),
    ],
)
def test_speed_counts_after_correctness(
    measures: list[str], said: str | None, small_model: Path
) -> None:
    results = run(small_model, *[measure(kind) for kind in measures])
    [speed] = [r for r in results if r.kind == "throughput"]
    assert [r.kind for r in results] == measures
    assert speed.outcome == ("not run" if said else "passed")
    assert (said or "") in speed.reason


def test_speed_does_not_count_where_anything_fails(
    small_model: Path, on_cpu: Callable[[Make], None]
) -> None:
    on_cpu(stage("moe_router", 1, shrink))
    kinds = ["invariant", "throughput", "memory"]
    results = run(small_model, *[measure(kind) for kind in kinds])
    assert [r.outcome for r in results] == ["failing", "not run", "not run"]
    assert "T0 is failing" in results[1].reason


@pytest.mark.parametrize(
    ("kind", "more", "threshold", "said"),
    [
        ("argmax", "model: {vocabulary: 151936}", "", "vocabulary 151936, got 320"),
        ("argmax", "model: {sample: true}", "", "expected the sample model, got another"),
        ("argmax", "model: {experts: 0}", "", "experts 0, got 8"),
        ("argmax", "device: {name: RTX}", "", "device: expected RTX"),
        ("argmax", "device: {memory_gb: {at_least: 1.0e+6}}", "", "GB of memory, got"),
        ("throughput", "", "ratio_to_peer: {at_least: 1}", "name it with --peer"),
        ("accuracy", "text: no/such/file", "", "expected no/such/file"),
        ("argmax", "", "", "token id: expected 0 to 319, got 320"),
    ],
)
def test_what_is_missing_is_not_run(
    kind: str, more: str, threshold: str, said: str, small_model: Path
) -> None:
    text = measure(kind, more, threshold)
    if kind == "accuracy":
        text = text.replace(f"prompts: {PROMPTS}, ", "")
    if "token id" in said:
        text = text.replace("[5, 6", "[5, 320")
    result = run(small_model, measure("parity"), text)[1]
    assert result.outcome == "not run"
    assert said in result.reason
    assert result.figures == {}


def test_a_dense_model_has_no_router(tmp_path: Path) -> None:
    dense = write_model(tmp_path / "dense.gguf", Geometry(experts=0))
    results = run(dense, measure("parity"), measure("router_sets"), measure("fault_injection"))
    assert [r.outcome for r in results] == ["passed", "not run", "not run"]


def test_no_device_no_model(
    small_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    on_cpu: Callable[[Make], None],
) -> None:
    def absent(*_: object) -> Backend:
        raise BackendUnavailable("cpu: expected a device, found none")

    assert [r.outcome for r in run(tmp_path / "absent.gguf", measure("parity"))] == ["not run"]
    on_cpu(absent)
    found = check(contract(measure("parity")), Path("x.yaml"), small_model, "cpu")
    assert [(r.outcome, r.reason) for r in found.results] == [
        ("not run", "cpu: expected a device, found none")
    ]
    assert found.device is None


def test_a_missing_dependency_is_not_run(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys  # noqa: PLC0415

    for name in [n for n in sys.modules if n == "isobit.verify.hf"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    [result] = run(small_model, measure("accuracy", "against: hf"))
    assert result.outcome == "not run"
    assert "expected PyTorch" in result.reason


def test_a_backend_that_breaks_is_failing(
    small_model: Path, on_cpu: Callable[[Make], None]
) -> None:
    class Silent(ReferenceBackend):
        def forward(self, batch, tap=None, stages=None):  # type: ignore[no-untyped-def]
            return super().forward(batch, tap, (stages or frozenset()) - {"attention"})

    on_cpu(Silent)
    [result] = run(small_model, measure("parity"))
    assert result.outcome == "failing"
    assert "could not be measured" in result.reason


def test_the_peer_is_asked(small_model: Path, tmp_path: Path) -> None:
    peer = tmp_path / "llama-bench"
    peer.write_text('#!/bin/sh\necho "[{\\"avg_ts\\": 0.5, \\"build_commit\\": \\"abc\\"}]"\n')
    peer.chmod(0o755)
    ratio = measure("throughput", threshold="ratio_to_peer: {at_least: 1}")
    result = run(small_model, measure("parity"), ratio, peer=str(peer))[1]
    assert result.outcome == "passed"
    assert result.figures["ratio_to_peer"] == result.figures["median_tokens_per_second"] / 0.5
    assert result.about["peer"] == "llama.cpp abc"
    for text in ("echo", "exit 3", "echo '[]'"):
        peer.write_text(f"#!/bin/sh\n{text}\n")
        assert run(small_model, measure("parity"), ratio, peer=str(peer))[1].outcome == "not run"


def test_measures_of_every_kind_are_taken() -> None:
    assert set(measuring._TAKERS) == set(MEASURES)
