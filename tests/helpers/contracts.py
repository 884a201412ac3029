"""A contract that nothing is wrong with, to break in one place at a time."""

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
