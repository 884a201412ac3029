"""A contract that nothing is wrong with, to break in one place at a time; and measures."""

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from isobit.backends.base import Backend
from isobit.config import EngineConfig
from isobit.contracts import document, validate
from isobit.contracts.schema import Contract
from isobit.model.weights import Weights
from isobit.verify.faults import ChangedStage

Make = Callable[[Weights, EngineConfig], Backend]
"""What makes a backend."""

GOOD = """\
metadata:
  version: "1.1.0"
  kind: kernel
  created: "2026-01-02"
  author: somebody
  description: What it is about.
  references:
    - a paper
  amendment_history:
    - version: "1.1.0"
      date: "2026-02-03"
      kind: amendment
      title: More
    - version: "1.0.0"
      date: "2026-01-02"
      kind: created
      title: First
kind: KernelContract
name: thing
version: "1.1.0"
status: ACTIVE_RUNTIME
equations:
  f:
    formula: y = x
    domain: x in R
proof_obligations:
  - id: AC_THING_001
    type: equivalence
    property: Same bits.
    tolerance: 0.0
  - id: AC_THING_002
    type: invariant
    property: Finite.
implementation_stages:
  - id: M-0
    status: SHIPPED
    description: All of it.
    evidence: [seen it]
    expected_acceptance: [AC_THING_001, AC_THING_002]
falsification_tests:
  - id: FALSIFY-001
    rule: A bit
    prediction: None differs.
    if_fails: Look.
    discharges: [AC_THING_001]
    measure:
      kind: parity
      backends: [cpu]
      against: reference
      prompts: [[605, 290, 948]]
      threshold:
        differing_values: {at_most: 0}
  - id: FALSIFY-002
    rule: A NaN
    prediction: There is none to be seen.
    if_fails: Look there.
    discharges: [AC_THING_002]
    measure:
      kind: invariant
      backends: [cpu, cuda]
      prompts: [[605, 290]]
      threshold:
        nonfinite_values: {at_most: 0}
qa_gate:
  id: F-THING-001
  name: Thing
  checks: [bits, NaN]
  pass_criteria: All 2 falsification tests pass.
"""


def broken(*changes: tuple[str, str]) -> str:
    """GOOD with parts replaced, each of which stands in it."""
    text = GOOD
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new, 1)
    return text


PROMPTS = "[[5, 6, 7, 8], [9, 10, 11]]"
MEASURES = {
    "parity": "differing_values: {at_most: 0}, layers_below_cosine_0_99: {at_most: 0}",
    "router_sets": "changed_sets: {at_most: 0}, changed_orders: {at_most: 0}",
    "argmax": "changed_prompts: {at_most: 0}",
    "invariant": "router_weight_deviation: {at_most: 1.0e-6}, nonfinite_values: {at_most: 0}",
    "determinism": "differing_values: {at_most: 0}",
    "kv_equivalence": "differing_values: {at_most: 0}",
    "fault_injection": "missed_faults: {at_most: 0}, misplaced_faults: {at_most: 0}",
    "accuracy": "mean_kl: {at_most: 1.0e-6}, top1_kept: {at_least: 0.9}",
    "throughput": "median_tokens_per_second: {at_least: 1.0e-3}",
    "memory": "used_fraction: {at_most: 0.99}",
}
HERE = "model: {layers: 2}, device: {memory_gb: {at_least: 0.1}}"
EXTRA = {
    "fault_injection": "faults: [one-ulp-norm, swapped-kv]",
    "throughput": f"tokens: 16, repeats: 1, {HERE}",
    "memory": f"context: 64, {HERE}",
}


def measure(kind: str, more: str = "", threshold: str = "") -> str:
    speed = kind in ("throughput", "memory")
    prompts = "" if speed else f"prompts: {PROMPTS}, "
    extra = "".join(f"{e}, " for e in (EXTRA.get(kind, ""), more) if e)
    return (
        f"{{kind: {kind}, backends: [cpu], {prompts}{extra}"
        f"threshold: {{{threshold or MEASURES[kind]}}}}}"
    )


def contract(*measures: str) -> Contract:
    head = GOOD[: GOOD.index("falsification_tests:")]
    tests = "".join(
        f"  - id: T{i}\n    rule: r\n    prediction: p\n    if_fails: f\n"
        "    discharges: [AC_THING_001]\n"
        f"    measure: {m}\n"
        for i, m in enumerate(measures)
    )
    d = document.parse(f"{head}falsification_tests:\n{tests}", "thing-v1.yaml")
    found = validate.validate(d)
    assert found is not None, d.findings
    assert not [f for f in d.findings if f.severity == "error"], d.findings
    return found


def stage(name: str, layer: int | None, change: Callable[[NDArray[Any]], None]) -> Make:
    return lambda w, e: ChangedStage(w, e, name, layer, change)
