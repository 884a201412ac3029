"""Taking measures: each passes on a right backend, fails on one with a planted fault, and is not
run, never passed, where something is missing."""

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from isobit.backends.base import GREEDY, Backend
from isobit.backends.reference import ReferenceBackend
from isobit.config import EngineConfig
from isobit.contracts import measure as sampler
from isobit.contracts import measure_speed as speed
from isobit.contracts.check import check
from isobit.contracts.evidence import Result
from isobit.contracts.kinds import Throughput
from isobit.errors import BackendUnavailable, NotRun
from isobit.model.weights import Weights
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

    def compute_logits(self, batch, tap, stages):  # type: ignore[no-untyped-def]
        out = super().compute_logits(batch, tap, stages)
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

    on_device = frozenset({GREEDY})

    def compute_greedy(self, tokens, _positions, _pages, count, _states):  # type: ignore[no-untyped-def]
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


def make_up(weights: NDArray[Any]) -> None:
    """One weight is below 0, and another as much above what it was: they sum to 1 still."""
    weights[:, 1] += 2 * weights[:, 0]
    weights[:, 0] *= -1


FAULTS: list[tuple[str, Make, str]] = [
    ("parity", stage("attn_norm", 1, one_ulp(np.random.default_rng(0))), "differing_values is"),
    ("parity", stage("post_ffn_residual", 1, negate), "layers_below_cosine_0_99 is 1"),
    ("router_sets", stage("moe_router_indices", 1, faults._wrong_expert), "changed_sets is"),
    ("router_sets", stage("moe_router_indices", 0, faults._swap_ranks), "changed_orders is"),
    ("argmax", stage("lm_head", None, raise_another), "changed_prompts is 2"),
    ("argmax", stage("lm_head", None, poison_top), "changed_prompts is 2"),
    ("invariant", stage("moe_router", 1, shrink), "router_weight_deviation is 0.0001"),
    ("invariant", stage("moe_router", 0, make_up), "router_weight_deviation is 1"),
    ("invariant", stage("attn_out", 0, poison), "nonfinite_values is"),
    ("determinism", Restless, "differing_values is"),
    ("determinism", lambda w, e: SingleTokens(w, e, 1, "swapped-kv"), "differing_values is"),
    ("kv_equivalence", lambda w, e: SingleTokens(w, e, 1, "rope-off-by-one"), "differing_values"),
    ("kv_equivalence", Greedy, "differing_values is"),
    (
        "accuracy",
        lambda w, e: ReferenceBackend(w, dataclasses.replace(e, activation_bits=8)),
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


def test_a_measure_sets_the_bits_of_its_activations(small_model: Path) -> None:
    """Of one contract, the same bound holds with 16 bits and fails with 8; each says which."""
    coarse = measure("accuracy", "activation_bits: 8")
    wide, narrow = run(small_model, measure("accuracy"), coarse)
    assert (wide.outcome, narrow.outcome) == ("passed", "failing")
    assert narrow.reason.startswith("mean_kl is")
    assert narrow.measure["activation_bits"] == 8
    assert "activation_bits" not in wide.measure
    [same] = run(small_model, measure("parity", "activation_bits: 8"))
    assert same.outcome == "passed"  # both sides have 8


def test_a_comparison_that_is_blind_fails(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "one_ulp", lambda _: np.copy)
    [result] = run(small_model, measure("fault_injection"))
    assert result.outcome == "failing"
    assert result.figures == {"missed_faults": 2.0, "misplaced_faults": 0.0}
    assert "one-ulp-norm in layer" in result.about["missed"][0]


def test_a_fault_in_the_backend_itself_is_no_fault_found(
    small_model: Path, on_cpu: Callable[[Make], None]
) -> None:
    on_cpu(stage("embedding", None, one_ulp(np.random.default_rng(0))))
    [result] = run(small_model, measure("fault_injection"))
    assert result.outcome == "failing"
    assert "where no fault is planted, got others at embedding" in result.reason


class Fused(ReferenceBackend):
    """Shows neither norms nor, in layer 1, what attention gives."""

    def __init__(self, weights: Weights, engine: EngineConfig) -> None:
        super().__init__(weights, engine)
        norms = {key for key in weights.graph.stages if key[0].endswith("norm")}
        self.fused_away = frozenset(norms | {("attention", 1)})

    def compute_logits(self, batch, tap, stages):  # type: ignore[no-untyped-def]
        def some(stage: str, layer: int | None, value: NDArray[Any]) -> None:
            if (stage, layer) not in self.fused_away:
                tap(stage, layer, value)

        return super().compute_logits(batch, tap and some, stages)


def test_what_a_backend_does_not_show_is_not_asked_for(
    small_model: Path, on_cpu: Callable[[Make], None]
) -> None:
    """A fault in it is looked for where it shows, if it does; if none does, nothing is shown."""
    on_cpu(Fused)
    faulty = measure("fault_injection").replace("[one-ulp-norm, swapped-kv]", "[all]")
    parity, invariant, found = run(
        small_model,
        measure("parity"),
        measure("invariant"),
        faulty.replace(PROMPTS, "[[5, 6, 7, 8]]"),
    )
    assert parity.outcome == invariant.outcome == found.outcome == "passed", (invariant, found)
    assert "one-ulp-norm: no attn_norm to compare" in found.about["not shown"]
    assert found.about["planted"] == len(faults.FAULTS) - len(found.about["not shown"]) > 15
    [none] = run(small_model, measure("fault_injection").replace(", swapped-kv]", "]"))
    assert (none.outcome, none.reason[:6]) == ("not run", "faults")


def test_all_faults_are_found_where_they_are(small_model: Path) -> None:
    text = measure("fault_injection").replace("[one-ulp-norm, swapped-kv]", "[all]")
    [result] = run(small_model, text.replace(PROMPTS, "[[5, 6, 7, 8]]"))
    assert result.outcome == "passed", result
    assert result.about["planted"] == len(faults.FAULTS)


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
        ("argmax", "model: {file_gb: {at_least: 17}}", "", "expected files of ≥ 17 GB, got 0.0"),
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
        def compute_logits(self, batch, tap, stages):  # type: ignore[no-untyped-def]
            return super().compute_logits(batch, tap, (stages or frozenset()) - {"attention"})

    on_cpu(Silent)
    [result] = run(small_model, measure("parity"))
    assert result.outcome == "failing"
    assert "could not be measured" in result.reason


ROW = {
    "avg_ts": 0.5,
    "build_commit": "abc",
    "n_prompt": 0,
    "n_gen": 16,
    "n_depth": 0,
    "gpu_info": "",
}


def test_the_peer_is_asked(small_model: Path, tmp_path: Path) -> None:
    peer = tmp_path / "llama-bench"

    def answers(row: object) -> None:
        peer.write_text(f"#!/bin/sh\ncat <<'E'\n{json.dumps(row)}\nE\n")
        peer.chmod(0o755)

    answers([ROW])
    ratio = measure("throughput", threshold="ratio_to_peer: {at_least: 1}")
    result = run(small_model, measure("parity"), ratio, peer=str(peer))[1]
    assert result.outcome == "passed", result.reason
    assert result.figures["ratio_to_peer"] == result.figures["median_tokens_per_second"] / 0.5
    assert result.about["peer"] == "llama.cpp abc"
    odd = [[{**ROW, "avg_ts": x}] for x in (None, 0, -1, math.nan, math.inf)]
    for row in ([], [3], [ROW | {"n_gen": 8}], [ROW | {"n_depth": 64}], *odd):
        answers(row)
        assert run(small_model, measure("parity"), ratio, peer=str(peer))[1].outcome == "not run"
    peer.write_text("#!/bin/sh\nexit 3\n")
    assert run(small_model, measure("parity"), ratio, peer=str(peer))[1].outcome == "not run"


def test_a_peer_on_the_cpu_is_none_of_a_gpu_s() -> None:
    measured = contract(measure("throughput")).falsification_tests[0].measure
    assert isinstance(measured, Throughput)
    speed._require_same_test(ROW | {"gpu_info": "H100"}, measured, on_gpu=True)
    with pytest.raises(NotRun, match="runs on the GPU too"):
        speed._require_same_test(ROW, measured, on_gpu=True)


def test_measures_of_every_kind_are_taken() -> None:
    assert set(sampler._TAKERS) == set(MEASURES)


# What each measure would pass on and should not: planted, one after the other.


def with_bounds(kind: str, threshold: str) -> str:
    return measure(kind, threshold=threshold)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        # compared with itself
        (measure("parity", "against: cpu"), "expected another backend than cpu itself"),
        (measure("router_sets", "against: cpu"), "expected another backend than cpu itself"),
        (measure("argmax", "against: cpu"), "expected another backend than cpu itself"),
        # of just any model or device
        (measure("throughput").replace("model: {layers: 2}, ", ""), "which model it means"),
        (measure("throughput").replace("{layers: 2}", "{}"), "which model it means"),
        (measure("memory").replace("model: {layers: 2}, ", ""), "which model it means"),
        (measure("memory").replace("{memory_gb: {at_least: 0.1}}", "{}"), "which device it means"),
        (measure("memory").replace("layers: 2", "layers: 48"), "layers 48, got 2"),
        # pieces that are one piece
        (measure("determinism", "chunks: [1, 4]"), "expected pieces smaller than a prompt, got 4"),
        # bounds that nothing here could miss
        (with_bounds("argmax", "changed_prompts: {at_most: 2}"), "0 to 2 are possible here"),
        (with_bounds("argmax", "changed_positions: {at_most: 7}"), "0 to 7 are possible"),
        (with_bounds("router_sets", "changed_sets: {at_most: 14}"), "0 to 14 are possible"),
        (with_bounds("parity", "layers_below_cosine_0_99: {at_most: 2}"), "0 to 2 are possible"),
        (with_bounds("fault_injection", "missed_faults: {at_most: 4}"), "0 to 4 are possible"),
        (with_bounds("parity", "differing_values: {at_most: 1.0e+9}"), "are possible here"),
        (with_bounds("determinism", "differing_values: {at_most: 1.0e+9}"), "are possible here"),
        (with_bounds("kv_equivalence", "differing_values: {at_most: 1.0e+9}"), "are possible"),
        (with_bounds("invariant", "nonfinite_values: {at_most: 1.0e+9}"), "are possible here"),
        (with_bounds("invariant", "router_weight_deviation: {at_most: 1}"), "0 to 1 are possible"),
        (with_bounds("parity", "least_layer_cosine: {at_least: -1}"), "-1 to 1 are possible here"),
        (with_bounds("accuracy", "top1_kept: {at_least: 0}"), "0 to 1 are possible here"),
        (with_bounds("throughput", "median_tokens_per_second: {at_least: 0}"), "0 to inf are"),
    ],
)
def test_what_would_pass_whatever_the_backend_did_is_not_run(
    text: str, said: str, small_model: Path
) -> None:
    result = run(small_model, measure("parity"), text)[1]
    assert (result.outcome, result.figures) == ("not run", {}), result
    assert said in result.reason


def test_less_text_than_was_promised_is_not_run(small_model: Path, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "short.txt").write_text("a b")
    text = measure("accuracy", "text: short.txt, tokens: 4000")
    text = text.replace(f"prompts: {PROMPTS}, ", "")
    found = check(contract(text), tmp_path / "thing-v1.yaml", small_model, "cpu").results[0]
    assert found.outcome == "not run"
    assert "expected 4000 tokens in short.txt, got" in found.reason


def test_a_text_is_a_file_of_the_repository(small_model: Path, tmp_path: Path) -> None:
    """A device was read for ever, and files of anybody could be measured."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "pyproject.toml").touch()
    (tmp_path / "other.txt").write_text("a b " * 900)
    os.mkfifo(home / "pipe")
    (home / "zero").symlink_to("/dev/zero")
    for name, said in (
        ("/dev/zero", "expected a file of the repository, got /dev/zero"),
        ("zero", "expected a file of the repository, got zero"),
        ("../other.txt", "expected a file of the repository"),
        ("pipe", "got a named pipe"),
        (".", "got a folder"),
        ("nosuch.txt", "no such file"),
        ("x" * 300, "File name too long"),
    ):
        text = measure("accuracy", f"text: {name}, tokens: 9").replace(f"prompts: {PROMPTS}, ", "")
        found = check(contract(text), home / "thing-v1.yaml", small_model, "cpu").results[0]
        assert found.outcome == "not run"
        assert said in found.reason


@pytest.mark.parametrize(
    ("geometry", "text", "said"),
    [
        ({"experts_used": 8}, measure("router_sets"), "experts that are left out"),
        (
            {"experts_used": 8},
            measure("accuracy", threshold="changed_sets: {at_most: 0.1}"),
            "leaves some out",
        ),
        ({"experts_used": 1}, measure("invariant"), "expected several experts a token, got 1"),
    ],
)
def test_what_a_model_cannot_get_wrong_is_not_run(
    geometry: dict[str, int], text: str, said: str, tmp_path: Path
) -> None:
    path = write_model(tmp_path / "model.gguf", Geometry(**geometry))
    [result] = run(path, text)
    assert result.outcome == "not run"
    assert said in result.reason


@pytest.mark.parametrize(
    "kind", ["parity", "router_sets", "argmax", "determinism", "kv_equivalence"]
)
def test_broken_alike_is_not_equal(
    kind: str, small_model: Path, on_cpu: Callable[[Make], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN on both sides has the same bits."""
    make = stage("final_norm", None, poison)
    on_cpu(make)
    monkeypatch.setattr("isobit.backends.reference.ReferenceBackend", make)
    [result] = run(small_model, measure(kind))
    assert result.outcome == "failing"
    assert "NaN" in result.reason or kind == "argmax"


def test_logits_that_are_all_equal_have_no_likeliest(
    small_model: Path, on_cpu: Callable[[Make], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    make = stage("lm_head", None, lambda value: value.fill(1))
    on_cpu(make)
    monkeypatch.setattr("isobit.backends.reference.ReferenceBackend", make)
    [result] = run(small_model, measure("argmax"))
    assert (result.outcome, "got equal logits" in result.reason) == ("not run", True)


def test_invariants_of_stages_that_were_not_seen_do_not_hold(
    small_model: Path, on_cpu: Callable[[Make], None]
) -> None:
    class Silent(ReferenceBackend):
        def compute_logits(self, batch, tap, stages):  # type: ignore[no-untyped-def]
            quiet = tap and (lambda s, i, v: tap(s, i, v) if s != "attn_out" else None)
            return super().compute_logits(batch, quiet, stages)

    on_cpu(Silent)
    [result] = run(small_model, measure("invariant"))
    assert result.outcome == "failing"
    assert "attn_out of layer 0: expected its values, got none" in result.reason


def test_mapped_weights_count_as_memory(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the cache that they ask for, of which nothing was touched yet."""
    monkeypatch.setattr(speed, "memory", lambda _: (1, 1 << 40))
    few, many = (
        run(small_model, measure("parity"), measure("memory").replace("context: 64", context))[1]
        for context in ("context: 64", "context: 256")
    )
    assert few.about["used_bytes"] == 1
    size = small_model.stat().st_size
    page = many.figures["used_gb"] * 1e9 - size
    assert page == 4 * (few.figures["used_gb"] * 1e9 - size) > 0
    assert few.figures["used_fraction"] == few.figures["used_gb"] * 1e9 / (1 << 40)


def test_memory_in_bytes_needs_no_device(small_model: Path) -> None:
    text = measure("memory", threshold="used_gb: {at_most: 100}")
    alone = text.replace(", device: {memory_gb: {at_least: 0.1}}", "")
    result = run(small_model, measure("parity"), alone)[1]
    assert result.outcome == "passed", result


def test_one_token_is_enough(small_model: Path) -> None:
    kinds = ("parity", "router_sets", "argmax", "fault_injection", "invariant", "kv_equivalence")
    results = run(small_model, *[measure(kind).replace(PROMPTS, "[[5]]") for kind in kinds])
    assert [(r.kind, r.outcome) for r in results] == [(k, "passed") for k in kinds], results


@pytest.mark.parametrize(
    ("kind", "make", "said"),
    [
        (
            "parity",
            stage("attn_norm", 1, one_ulp(np.random.default_rng(0))),
            r"prompt 0: first at attn_norm of layer 1 from position \d",
        ),
        ("parity", stage("post_ffn_residual", 1, negate), r"layer 1 at -"),
        (
            "router_sets",
            stage("moe_router_indices", 1, faults._wrong_expert),
            r"layer 1 position 3: cpu took \d, reference \d; margins 0",
        ),
        (
            "argmax",
            stage("lm_head", None, raise_another),
            r"after position 3 cpu goes on with '.*' \(\d+\), reference with '.*' \(\d+\)",
        ),
        (
            "accuracy",
            stage("lm_head", None, raise_another),
            r"mean_kl is .*: prompt \d: KL .* after position \d; prompt 0: after position 3 cpu "
            r"goes on with '.*' \(\d+\), oracle with '.*' \(\d+\)",
        ),
        ("invariant", stage("moe_router", 1, shrink), r"layer 1 position \d: \[0\.\d"),
        ("invariant", stage("attn_out", 0, poison), "attn_out of layer 0 at position"),
        ("determinism", Restless, r"run again: \d+ logits, from position 0"),
        ("kv_equivalence", Greedy, "chosen otherwise on the device"),
    ],
)
def test_a_failure_says_where(
    kind: str, make: Make, said: str, small_model: Path, on_cpu: Callable[[Make], None]
) -> None:
    on_cpu(make)
    [result] = run(small_model, measure(kind))
    assert result.outcome == "failing"
    assert re.search(said, result.reason), result.reason
    if kind in ("accuracy", "argmax"):
        assert result.about["flipped"] == [0, 1]


def test_an_accuracy_says_which_experts(small_model: Path, on_cpu: Callable[[Make], None]) -> None:
    on_cpu(stage("moe_router_indices", 1, faults._wrong_expert))
    [result] = run(small_model, measure("accuracy", threshold="changed_sets: {at_most: 0.01}"))
    assert "prompt 0: first in layer 1 at position 3" in result.reason
