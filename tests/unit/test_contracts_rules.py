"""Every rule of validate and lint: a contract broken in one place, and the finding it must give."""

import json
from pathlib import Path

import jsonschema
import pytest

from isobit.cli import main, options_of
from isobit.contracts import document, findings, lint, references, validate
from isobit.contracts.findings import RULES, Finding
from isobit.contracts.kinds import FIGURES, Bound, never_fails
from isobit.contracts.schema import Contract, json_schema
from tests.helpers.contracts import GOOD, broken

SHIPPED = sorted((Path(__file__).parents[2] / "contracts").glob("*.yaml"))


def judged(text: str, path: str = "thing-v1.yaml") -> list[Finding]:
    d = document.parse(text, path)
    contract = validate.validate(d)
    if contract is not None:
        lint.lint(d, contract, options_of)
    return d.findings


def test_nothing_is_wrong_with_the_good_one() -> None:
    assert judged(GOOD) == []


MEASURE = GOOD[GOOD.index("    measure:\n      kind: invariant") : GOOD.index("qa_gate:")]
KANI = "kani_harnesses:\n  - id: KANI-1\n    obligation: {}\nqa_gate:"
TEXT = "if_fails: Look."
TOO_FEW = "changed_prompts: {at_most: 1}"
CASES: list[tuple[str, str, list[tuple[str, str]], str]] = [
    # rule, severity, changes, text of the line it must point to
    ("missing", "error", [("  description: What it is about.\n", "")], "  version:"),
    ("missing", "error", [("      kind: parity\n", "")], "      backends: [cpu]\n"),
    ("type", "error", [('  version: "1.1.0"\n  kind', "  version: 1.1\n  kind")], "version: 1.1\n"),
    ("type", "error", [('"2026-01-02"\n  author', '"2026-13-02"\n  author')], '"2026-13-02"'),
    ("type", "error", [('"2026-01-02"\n  author', '"2026-02-30"\n  author')], '"2026-02-30"'),
    ("type", "error", [("references:\n    - a paper", "references: a paper")], ": a paper"),
    ("type", "error", [("backends: [cpu]", "backends: [gpu]")], "[gpu]"),
    ("type", "error", [("kind: parity", "kind: party")], "party"),
    ("type", "error", [("[[605, 290, 948]]", "[[]]")], "[[]]"),
    ("type", "error", [("[[605, 290, 948]]", "[[605, -1]]")], "[[605, -1]]"),
    ("type", "error", [("[[605, 290, 948]]", "[]")], "prompts: []"),
    ("type", "error", [("{at_most: 0}", "{}")], "differing_values: {}"),
    ("type", "error", [("{at_most: 0}", "{at_most: 1.0e+999}")], "at_most: 1.0e+999"),
    ("type", "error", [("differing_values", "differing_vals")], "kind: parity"),
    ("unknown-key", "error", [("  author:", "  autor:")], "autor"),
    ("unknown-key", "error", [("discharges: [AC_THING_001]", "discharge: [X]")], "discharge:"),
    ("unknown-key", "error", [("at_most: 0", "at_mots: 0, at_most: 0")], "at_mots"),
    ("unknown-key", "warning", [("kind: KernelContract", "colour: blue")], "colour"),
    ("unknown-status", "warning", [("ACTIVE_RUNTIME", "ACTIVE_RUNTIM")], "ACTIVE_RUNTIM"),
    ("unknown-status", "warning", [("SHIPPED", "SORT_OF")], "SORT_OF"),
    ("empty", "warning", [("  references:\n    - a paper\n", "")], "  version:"),
    ("empty", "warning", [("equations:\n  f:\n    formula: y = x\n    domain: x in R\n", "")], ""),
    ("empty", "error", [("    if_fails: Look there.\n", "")], "FALSIFY-002"),
    ("empty", "error", [("if_fails: Look there.", "if_fails: '  '")], "FALSIFY-002"),
    ("empty", "error", [(MEASURE, "")], "FALSIFY-002"),
    ("empty", "error", [(MEASURE, "    test: ''\n")], "FALSIFY-002"),
    ("duplicate-id", "error", [("id: FALSIFY-002", "id: FALSIFY-001")], "    rule: A NaN"),
    ("duplicate-id", "error", [("- id: AC_THING_002", "- id: AC_THING_001")], "invariant"),
    ("duplicate-key", "error", [("name: thing\n", "name: thing\nname: twice\n")], "name: twice"),
    ("version-mismatch", "error", [('version: "1.1.0"\nstatus', 'version: "1.0.0"\nstatus')], ""),
    ("amendment-order", "error", [('date: "2026-02-03"', 'date: "2025-02-03"')], "2025-02-03"),
    ("amendment-newest", "error", [('- version: "1.1.0"', '- version: "1.2.0"')], "1.2.0"),
    ("test-count", "error", [("All 2 falsification", "All 7 falsification")], "All 7"),
    ("test-count", "error", [("All 2 falsification", "All three")], "All three"),
    (
        "test-count",
        "error",
        [("qa_gate:", "verification_summary:\n  total_obligations: 3\nqa_gate:")],
        "total_obligations",
    ),
    ("obligation-uncovered", "error", [("    discharges: [AC_THING_002]\n", "")], "AC_THING_002"),
    ("test-unneeded", "warning", [("    discharges: [AC_THING_002]\n", "")], "FALSIFY-002"),
    ("unknown-id", "error", [("discharges: [AC_THING_002]", "discharges: [AC_X_002]")], "AC_X_002"),
    ("unknown-id", "error", [("[AC_THING_001, AC_THING_002]", "[AC_THING_003]")], "AC_THING_003"),
    ("stage-without-evidence", "error", [("    evidence: [seen it]\n", "")], "SHIPPED"),
    ("status-contradicted", "error", [("status: SHIPPED", "status: PENDING")], "PENDING"),
    (
        "status-contradicted",
        "error",
        [("property: Finite.", "property: Finite.\n    divergence: KNOWN_DIVERGENCE_NOT_BENIGN")],
        "KNOWN_DIVERGENCE_NOT_BENIGN",
    ),
    (
        "status-contradicted",
        "warning",
        [("    evidence: [seen it]", "    evidence: [seen it]\n    blockers: [time]")],
        "blockers",
    ),
    (
        "prediction-contradicted",
        "error",
        [("prediction: None differs.", "prediction: The function does not exist.")],
        "does not exist",
    ),
    (
        "prediction-contradicted",
        "warning",
        [("property: Finite.", "property: Finite.\n    divergence: KNOWN_DIVERGENCE_NOT_BENIGN")],
        "There is none",
    ),
    (
        "cited-option",
        "error",
        [("if_fails: Look.", "test: isobit verify sample --aganst cpu")],
        "--aganst",
    ),
    ("cited-option", "error", [("if_fails: Look.", "test: isobit verfy sample")], "verfy"),
    ("cited-option", "error", [("if_fails: Look.", "test: isobit contract chck X")], "chck"),
    ("cited-option", "error", [(TEXT, "test: isobit verify sample --backend gpu")], "gpu"),
    ("cited-option", "error", [(TEXT, "test: isobit verify sample --planes 3")], "--planes 3"),
    ("cited-option", "error", [(TEXT, "test: isobit verify sample --json -q")], "-q"),
    ("test-count", "error", [("All 2 falsification tests", "7/7 falsifiers")], "7/7"),
    ("test-count", "error", [("All 2 falsification tests pass", "7/7 green")], "7/7"),
    ("test-count", "error", [("All 2 falsification tests", "All 5 tests")], "All 5"),
    ("test-count", "error", [("tests pass.", "tests, 2 Kani harnesses pass.")], "2 Kani"),
    (
        "test-count",
        "warning",
        [("description: All of it.", "description: All 7 falsifiers pass.")],
        "All 7 falsifiers",
    ),
    ("future-date", "error", [('"2026-01-02"\n  author', '"2999-01-02"\n  author')], "2999"),
    ("future-date", "error", [('date: "2026-02-03"', 'date: "2999-02-03"')], "2999"),
    (
        "dangling-reference",
        "error",
        [("tolerance: 0.0", "applies_to: ff"), ("  f:\n", "  fff:\n")],
        "applies_to: ff",
    ),
    ("dangling-reference", "warning", [("tolerance: 0.0", "applies_to: gone")], "gone"),
    ("dangling-reference", "error", [("qa_gate:", KANI.format("AC_THING_003"))], "AC_THING_003"),
    ("dangling-reference", "warning", [("qa_gate:", KANI.format("round_trip"))], "round_trip"),
    ("evidence-of-itself", "error", [("[seen it]", "[see thing-v1.yaml]")], "thing-v1.yaml"),
    (
        "unknown-id",
        "error",
        [("property: Finite.", "property: F.\n    discharged_by: F-03")],
        "F-03",
    ),
    ("prompts-alike", "warning", [("[[605, 290]]", "[[5, 2], [5, 2]]")], "[[5, 2], [5, 2]]"),
    ("prompts-alike", "warning", [("[[605, 290, 948]]", "[[605], [17]]")], "[[605], [17]]"),
    (
        "unknown-id",
        "error",
        [
            ("kind: invariant\n", "kind: fault_injection\n      faults: [swaped-kv]\n"),
            ("nonfinite_values", "missed_faults"),
            ("backends: [cpu, cuda]", "backends: [cuda]"),
        ],
        "swaped-kv",
    ),
    ("threshold-cannot-hold", "error", [("{at_most: 0}", "{at_most: -1}")], "at_most: -1"),
    (
        "threshold-cannot-hold",
        "error",
        [("{at_most: 0}", "{at_most: 1, at_least: 2}")],
        "at_least: 2",
    ),
    ("threshold-cannot-fail", "error", [("{at_most: 0}", "{at_least: 0}")], "at_least: 0"),
    (
        "threshold-cannot-fail",
        "error",
        [("kind: parity", "kind: argmax"), ("differing_values: {at_most: 0}", TOO_FEW)],
        "at_most: 1}",
    ),
    ("threshold-cannot-fail", "error", [("{at_most: 0}", "{at_most: 1.0e+301}")], "e+301"),
    ("threshold-cannot-fail", "error", [("against: reference", "against: cpu")], "against: cpu"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "severity", "changes", "line"), CASES)
def test_each_rule(rule: str, severity: str, changes: list[tuple[str, str]], line: str) -> None:
    text = broken(*changes)
    found = [f for f in judged(text) if f.rule == rule and f.severity == severity]
    assert found, judged(text)
    for f in found:
        assert f.file == "thing-v1.yaml"
        assert "expected" in f.message
    if line:
        # a block's place is its first line; the finding stands in it
        at = text.index(line)
        assert text[:at].count("\n") + 1 in range(found[0].line, found[0].line + 3)


def test_no_rule_is_without_a_case() -> None:
    elsewhere = {"yaml-syntax", "yaml-limit", "yaml-tag", "yaml-alias", "yaml-key"}
    elsewhere |= {"cited-file", "cited-test", "not-a-contract", "status-not-shown"}
    assert {rule for rule, *_ in CASES} == set(RULES) - elsewhere


def test_what_is_no_contract() -> None:
    assert [f.rule for f in judged("- 1\n")] == ["type"]
    assert [f.rule for f in judged("")] == ["type"]
    [binding] = judged("version: 1.0\nbindings: []\n")  # another kind of file, said once
    assert "a file with version, bindings" in binding.message
    title = "contract: a\nmetadata: {title: t}\nfalsification: [{condition: c}]\n"
    for other in ("version: 1.0\nbindings: []\n", title):
        [finding] = judged(other)
        assert (finding.rule, finding.severity) == ("not-a-contract", "warning")
    for odd in ("[{id: [1]}]", "[{id: {a: b}}]", "[3]", "[{formula: x}]", "x"):
        text = broken(("equations:\n  f:\n    formula: y = x\n", f"equations: {odd}\nf:\n"))
        assert "type" in {f.rule for f in judged(text)}, odd
    for meant in ("falsification_test: []\n", "metadata: {version: '1.0.0'}\n", "{}\n"):
        assert "error" in {f.severity for f in judged(meant)}, meant
    rules = {f.rule for f in judged("a: 1\nequations: {f: {formula: x}}\n")}
    assert rules == {"missing", "unknown-key", "empty"}


@pytest.mark.parametrize(
    ("kind", "promises", "severity"),
    [
        ("kernel", False, "error"),
        ("", False, "error"),  # a kernel where nothing is said
        ("pattern", False, "warning"),  # of another layout, perhaps
        ("pattern", True, "error"),
    ],
)
def test_what_promises_has_to_say_what_would_refute_it(
    kind: str, promises: bool, severity: str
) -> None:
    text = "metadata:\n  version: '1.0.0'\n  description: d\n  references: [r]\n"
    text += f"  kind: {kind}\n" if kind else ""
    text += "proof_obligations: [{property: p}]\n" if promises else "categories: [a]\n"
    found = [f for f in judged(text) if "falsification_tests" in f.message]
    assert [f.severity for f in found] == [severity], found


def test_other_files_among_contracts_are_named_and_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Public repositories keep registries, bindings, … in contracts/ too."""
    good, other = tmp_path / "good-v1.yaml", tmp_path / "binding.yaml"
    good.write_text(GOOD)
    other.write_text("version: 1.0\nbindings: []\n")
    assert main(["contract", "lint", str(good), str(other)]) == 0
    out = capsys.readouterr().out
    assert f"{other}:1:1: warning[not-a-contract]: expected a contract" in out
    assert "Contracts are valid (1; files that are none: 1)" in out
    assert main(["contract", "lint", str(other)]) == 1  # nothing was judged
    assert "error[not-a-contract]" in capsys.readouterr().out
    assert main(["contract", "status", str(other)]) == 3
    assert "expected a contract" in capsys.readouterr().err


PUBLIC: dict[str, list[tuple[str, str]]] = {
    "a test that is written out": [(MEASURE, '    falsification_test: "fn falsify() {}"\n')],
    "a test in a file": [(MEASURE, "    implementation: see the file\n    status: IMPLEMENTED\n")],
    "a harness and a name": [
        (MEASURE, "    test_harness: cargo test\n"),
        ("rule: A NaN", "name: a_nan"),
    ],
    "no rule": [("    rule: A NaN\n", "")],
    "a gate without a name": [("  id: F-THING-001\n  name: Thing\n", "")],
    "a list of equations": [
        ("  f:\n    formula: y = x\n    domain: x in R", "  - id: f\n    formal: y = x"),
        ("tolerance: 0.0", "applies_to: f"),
    ],
}


@pytest.mark.parametrize("changes", PUBLIC.values(), ids=PUBLIC)
def test_layouts_of_public_contracts(changes: list[tuple[str, str]]) -> None:
    text = broken(*changes)
    assert [f for f in judged(text) if "'status'" not in f.message] == []
    judge = jsonschema.Draft202012Validator(json_schema())
    data = document.parse(text).data
    for test in data["falsification_tests"]:
        test.pop("status", None)
    assert list(judge.iter_errors(data)) == []


def test_the_file_s_name_says_the_version_too() -> None:
    [finding] = judged(GOOD, "thing-v2.yaml")
    assert (finding.rule, finding.severity) == ("version-mismatch", "warning")
    assert "expected version 2.x.y" in finding.message


def test_history_in_either_order() -> None:
    newest = GOOD[GOOD.index('    - version: "1.1.0"') : GOOD.index('    - version: "1.0.0"')]
    oldest_first = broken((newest, ""), ("      title: First\n", "      title: First\n" + newest))
    assert judged(oldest_first) == []
    twice = broken(('    - version: "1.0.0"', '    - version: "1.1.0"'))
    assert "amendment-order" in {f.rule for f in judged(twice)}


def test_ids_in_the_text_count_where_none_are_typed() -> None:
    text = broken(
        ("    discharges: [AC_THING_001]\n", ""),
        ("    discharges: [AC_THING_002]\n", ""),
        ("rule: A bit", "rule: A bit (AC_THING_001..002)"),
    )
    assert {f.rule for f in judged(text)} == {"test-unneeded"}
    text = broken(
        ("    discharges: [AC_THING_001]\n", ""),
        ("    discharges: [AC_THING_002]\n", ""),
        ("rule: A bit", "rule: A bit, AC_THING_001/002"),
        ("rule: A NaN", "rule: A NaN, AC_THING_002"),
        ("  - id: AC_THING_002\n    type", "  - type"),
        ("property: Finite.", "property: 'Finite. (AC_THING_002)'"),
    )
    assert judged(text) == []
    known = frozenset({"A_001", "A_002", "A_0003", "A_004", "B_02", "C_02"})
    assert references.named("A_001..003, B_01..02", known) == {"A_001", "A_002", "B_02"}
    assert references.named("A_0001..0999", frozenset({"A_0100", "A_0101"})) == {"A_0100"}
    assert references.named("A_001/004, C_03..01, A_0003", known) == {"A_001", "A_004", "A_0003"}


TESTS = """\
import pytest, unittest
def test_one(): pass
# def test_two(): pass
'''def test_three(): pass'''
@pytest.mark.skipif(True, reason="no such device")
@pytest.mark.parametrize("skip", [1])
def test_four(skip): pass
@pytest.mark.skip
def test_five(): pass
@pytest.mark.xfail(reason="some day")
async def test_six(): pass
class TestA:
    def test_in(self): pass
    @unittest.skip("later")
    def test_off(self): pass
class TestB:
    pytestmark = pytest.mark.xfail
    def test_b(self): pass
if True:
    def test_seven(): pass
"""
RUN = [f"tests/test_a.py::{name}" for name in ("test_four", "TestA::test_in", "test_seven")]
NOT_RUN = [
    *(f"tests/test_a.py::test_{name}" for name in ("three", "five", "six", "in_a")),
    *(f"tests/test_a.py::{name}" for name in ("TestA::test_off", "TestB::test_b", "TestA::test_b")),
    *("tests/test_off.py::test_one", "tests/test_broken.py::test_one"),
]


def test_citations_are_looked_up_in_the_repository(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_a.py").write_text(TESTS)
    (tmp_path / "tests/test_off.py").write_text(
        "import pytest\npytestmark = [pytest.mark.skip('later')]\ndef test_one(): ...\n"
    )
    (tmp_path / "tests/test_broken.py").write_text("def test_one(:\n")
    path = str(tmp_path / "thing-v1.yaml")
    cited = {
        "tests/test_a.py": [],
        "tests/test_a.py::test_one": [],
        "see https://example.org/tests/test_b.py": [],
        "tests/test_b.py": ["cited-file"],
        "tests/test_a.py::test_two": ["cited-test"],
        **{name: [] for name in RUN},
        **{name: ["cited-test"] for name in NOT_RUN},
        "../tests/test_b.py": [],
    }
    for text, rules in cited.items():
        found = judged(broken(("[seen it]", f"['{text}']")), path)
        assert [f.rule for f in found] == rules, text
    alone = "/nowhere/thing-v1.yaml"  # in no repository
    assert judged(broken(("[seen it]", "[tests/test_b.py]")), alone) == []


def test_tests_are_looked_up_by_class_keyword_and_target(tmp_path: Path) -> None:
    (tmp_path / "Cargo.toml").write_text('[package]\nname = "a"\n[[bin]]\nname = "tool"\n')
    (tmp_path / "tests/more").mkdir(parents=True)
    (tmp_path / "tests/test_a.py").write_text("class TestA:\n    def test_one(self): ...\n")
    (tmp_path / "tests/parity.rs").write_text("mod inner { fn same() {} } // commented\n")
    (tmp_path / "tests/more/main.rs").touch()
    path = str(tmp_path / "thing-v1.yaml")
    cited = {
        "pytest tests/test_a.py::TestA::test_one": 0,
        "pytest tests/test_a.py::TestA::gone": 1,
        "pytest tests/test_a.py::Gone::test_one": 1,
        "tests/parity.rs::inner::same": 0,
        "tests/parity.rs::inner::gone": 1,
        "pytest tests/test_a.py -k one": 0,
        "pytest -k 'one and not gone_too'": 1,
        "pytest -k gone": 1,
        "pytest tests -k=gone -q": 1,
        "cargo test --test parity": 0,
        "cargo test -p a --test more -- --nocapture": 0,
        "cargo test same": 0,
        "cargo test inner::same -- --ignored --test-threads 1": 0,
        "cargo test inner::": 0,
        "cargo test --lib -- parity": 0,
        "cargo test -- --skip gone --nocapture": 0,
        "cargo test --features gone same": 0,
        "cargo test gone": 1,
        "cargo test -p a inner::gone -- --nocapture": 1,
        "cargo test -- gone": 1,
        "cargo test -- same gone": 1,
        "cargo test commented": 1,
        "cargo test --lib -- --exact gone": 1,
        "cargo test -p elsewhere gone": 0,
        "cargo test --test gone": 1,
        "cargo test -p a --test gone": 1,
        "cargo test -p elsewhere --test gone": 0,
        "cargo test --lib": 0,
    }
    for text, number in cited.items():
        found = judged(broken((TEXT, f'test: "{text}"\n    {TEXT}')), path)
        assert [f.rule for f in found] == ["cited-test"] * number, text


def test_what_comes_to_be_when_a_test_runs_is_not_missing(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data/there.json").touch()
    path = str(tmp_path / "thing-v1.yaml")
    cited = {
        "run checkpoints/model.gguf": 0,  # no such folder here: it is made, or brought
        "run data/model.gguf": 0,  # of none like it
        "run data/gone.json": 1,  # beside others like it
        "run data/gone.py": 1,
        "run dat/there.json": 0,
        "run dato/gone.py": 1,  # data/ was meant
        "run > data/made.json": 0,
        "run --output data/made.json": 0,
    }
    for text, number in cited.items():
        found = judged(broken((TEXT, f'test: "{text}"\n    {TEXT}')), path)
        assert [f.rule for f in found] == ["cited-file"] * number, text
    evidence = judged(broken(("[seen it]", "[runs/model.gguf]")), path)
    assert [f.rule for f in evidence] == ["cited-file"]  # evidence has to be there


def test_contracts_built_upon_are_looked_up(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / "contracts/more").mkdir(parents=True)
    (tmp_path / "contracts/softmax-kernel-v1.yaml").touch()
    path = str(tmp_path / "contracts/more/thing-v1.yaml")
    cited: dict[str, list[str]] = {
        "softmax-kernel-v1": [],
        "contracts/softmax-kernel-v1.yaml": [],
        "softmax-kernel-v2": ["error"],  # near one that is there
        "of-another-repository-v1": ["warning"],
        "thing-v1": ["error"],  # itself
    }
    for name, severities in cited.items():
        text = broken(("  amendment_history", f"  depends_on: [{name}]\n  amendment_history"))
        found = [f for f in judged(text, path) if f.rule == "dangling-reference"]
        assert [f.severity for f in found] == severities, name


def test_promises_without_ids_are_left_until_something_needs_them() -> None:
    """Most public contracts name none; their harnesses count: SM-INV-001 is the first."""
    measures = GOOD[
        GOOD.index("    discharges: [AC_THING_001]") : GOOD.index("  - id: FALSIFY-002")
    ]
    plain = broken(
        ("  - id: AC_THING_001\n    type", "  - type"),
        ("  - id: AC_THING_002\n    type", "  - type"),
        ("    expected_acceptance: [AC_THING_001, AC_THING_002]\n", ""),
        (measures, "    test: Look closely.\n"),
        ("    discharges: [AC_THING_002]\n" + MEASURE, "    test: Look closely.\n"),
    )
    for name, severities in (("SM-INV-002", []), ("SM-INV-003", ["warning"])):
        text = plain.replace("qa_gate:", KANI.format(name))
        assert [f.severity for f in judged(text)] == severities, name
    measured = broken(
        ("  - id: AC_THING_001\n    type", "  - type"),
        ("  - id: AC_THING_002\n    type", "  - type"),
    )
    assert "obligation-uncovered" in {f.rule for f in judged(measured)}


def test_obligations_name_their_tests_by_place_or_in_brackets() -> None:
    text = broken(
        ("property: Same bits.", "property: Same bits (FALSIFY-001)"),
        ("property: Finite.", "property: Finite.\n    discharged_by: falsification_tests[1]"),
        ("    discharges: [AC_THING_001]\n", ""),
        ("    discharges: [AC_THING_002]\n", ""),
    )
    assert judged(text) == []
    contract = validate.validate(document.parse(text))
    assert contract is not None
    assert references.served(contract) == {
        "FALSIFY-001": {"AC_THING_001"},
        "FALSIFY-002": {"AC_THING_002"},
    }
    gone = text.replace("falsification_tests[1]", "falsification_tests[2]")
    assert "unknown-id" in {f.rule for f in judged(gone)}


def test_the_layout_that_says_statement_and_discharged_by() -> None:
    text = broken(
        ("    type: equivalence\n    property: Same bits.", "    statement: Same bits."),
        ("property: Finite.", "property: Finite.\n    discharged_by: [FALSIFY-002]"),
        ("    discharges: [AC_THING_002]\n", ""),
    )
    assert judged(text) == []
    contract = validate.validate(document.parse(text))
    assert contract is not None
    assert contract.proof_obligations[0].property == "Same bits."
    assert references.served(contract)["FALSIFY-002"] == {"AC_THING_002"}
    judge = jsonschema.Draft202012Validator(json_schema())
    assert list(judge.iter_errors(document.parse(text).data)) == []
    without = broken(("    property: Finite.\n", ""))
    assert list(judge.iter_errors(document.parse(without).data))
    assert "missing" in {f.rule for f in judged(without)}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_contracts_have_no_findings(path: Path) -> None:
    d = document.read(path)
    contract = validate.validate(d)
    assert contract is not None
    lint.lint(d, contract, options_of)
    assert d.findings == []


def test_all_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a,b-v1.yaml"
    path.write_text(broken(("  author:", "  autor:"), ("ACTIVE_RUNTIME", "ODD")))
    assert main(["contract", "validate", str(path)]) == 1
    out = capsys.readouterr().out
    assert f"{path}:5:3: error[unknown-key]: " in out
    assert "1 error(s), 1 warning(s)\nContract is not valid" in out
    assert main(["contract", "validate", str(path), "--format", "json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["errors"], found["warnings"], found["findings"][0]["line"]) == (1, 1, 5)
    assert main(["contract", "validate", str(path), "--format", "github"]) == 1
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith(f"::error file={str(path).replace(',', '%2C')},line=5,col=3,title=")
    assert main(["contract", "validate", str(path), "--format", "sarif"]) == 1
    log = json.loads(capsys.readouterr().out)
    run = log["runs"][0]
    assert log["version"] == "2.1.0"
    assert {r["id"] for r in run["tool"]["driver"]["rules"]} == {"unknown-key", "unknown-status"}
    region = run["results"][0]["locations"][0]["physicalLocation"]["region"]
    assert region == {"startLine": 5, "startColumn": 3}
    path.write_text(GOOD)
    assert main(["contract", "validate", str(path)]) == 0
    assert capsys.readouterr().out == "0 error(s), 0 warning(s)\nContract is valid\n"
    assert main(["contract", "validate", str(tmp_path / "absent.yaml")]) == 3


def test_control_characters_reach_no_terminal() -> None:
    shown = findings.text(judged(broken(("name: thing", '"\\e[2J": 1'))))
    assert "unknown-key" in shown
    assert "\x1b" not in shown


def test_json_schema_says_what_every_field_means() -> None:
    schema = json_schema()
    parts = [schema, *schema["$defs"].values()]
    undocumented = [
        (p["title"], name)
        for p in parts
        for name, field in p.get("properties", {}).items()
        if "description" not in field and name != "kind"
    ]
    assert undocumented == []
    assert all(p.get("additionalProperties") is False for p in parts if "properties" in p)
    assert set(schema["required"]) == {"metadata"}
    judge = jsonschema.Draft202012Validator(schema)
    judge.check_schema(schema)
    for path in SHIPPED:
        assert list(judge.iter_errors(document.read(path).data)) == []
    for changed in (
        ("  author:", "  autor:"),
        ("kind: parity", "kind: party"),
        ("at_most: 0", "at_least: x"),
        ("      against: reference", "      against: hf"),
        ("[[605, 290, 948]]", "[[]]"),
    ):
        assert list(judge.iter_errors(document.parse(broken(changed)).data)), changed
    assert list(judge.iter_errors(document.parse(GOOD).data)) == []
    kinds = schema["$defs"]["FalsificationTest"]["properties"]["measure"]["anyOf"][0]
    assert set(kinds["discriminator"]["mapping"]) == set(FIGURES)


def test_the_layout_reads_public_contracts() -> None:
    """Keys that public contracts have and isobit does not use."""
    text = broken(
        ("kind: KernelContract\n", "enforcement:\n  x: {description: y, severity: ERROR}\n"),
        (
            "    tolerance: 0.0",
            "    tolerance: 1 ULP\n    applies_to: simd\n    lean: {theorem: T}",
        ),
        ("evidence: [seen it]", "evidence: seen it"),
        ("expected_acceptance: [AC_THING_001, AC", "expected_acceptance: [AC"),
        ("  pass_criteria: All 2 falsification tests pass.\n", ""),
        ("      kind: created", "      kind: status_promotion"),
        ("    domain: x in R", "    domain: x in R\n    lean_theorem: T.f"),
        (
            "  checks: [bits, NaN]",
            "  min_coverage: 0.90\n  max_complexity: 15\n  required_tests: [x]",
        ),
        (
            "qa_gate:",
            "kani_harnesses:\n  - id: KANI-1\n    obligation: AC_THING_001\n    bound: 8\n"
            "    strategy: bounded_int\n    solver: cadical\n    harness: verify\nqa_gate:",
        ),
    )
    assert judged(text) == []
    partly = broken(
        ("ACTIVE_RUNTIME", "ACTIVE_ALGORITHM_LEVEL"), ("SHIPPED", "PARTIALLY_DISCHARGED")
    )
    assert judged(partly) == []
    more = broken(("    evidence: [seen it]", "    evidence: x\n    unblocks_obligations: [A]"))
    assert [(f.rule, f.severity) for f in judged(more)] == [("unknown-key", "warning")]


@pytest.mark.parametrize("value", [float("nan"), 1.5, -0.5])
def test_bounds(value: float) -> None:
    assert not Bound(at_least=0.0, at_most=1.0).holds(value)
    assert Bound(at_least=0.0, at_most=1.0).holds(0.0)
    assert Bound(at_most=1.0).holds(-5)
    assert not Bound(at_most=1.0).holds(float("inf"))


def test_never_fails_for_every_figure() -> None:
    for figures in FIGURES.values():
        for figure in figures.values():
            assert never_fails(Bound(at_least=figure.low), figure)
            assert never_fails(Bound(at_most=min(figure.high, 1e300)), figure)
            inside = figure.low + 0.5
            assert not never_fails(Bound(at_most=inside), figure)
            assert not never_fails(Bound(at_least=inside), figure)


def test_unread_keys_are_not_lost_on_the_way() -> None:
    assert Contract.model_validate({"metadata": {"version": "1.0.0", "description": "x"}, "z": 1})
