"""Statuses, classes of divergence and amendments: what evidence says, and nothing that is typed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from isobit import numerics
from isobit.cli import main
from isobit.contracts import claims, document, status, status_report, validate
from isobit.contracts.check import code_of, described
from isobit.contracts.evidence import Evidence, Result, code_digest
from isobit.contracts.schema import STATUSES, Contract
from isobit.contracts.target import sample_digest
from isobit.errors import GateFailed
from tests.helpers.contracts import GOOD, broken

ONE_BACKEND = ("backends: [cpu, cuda]", "backends: [cpu]")
PROMPTS = ("prompts: [[605, 290]]", "prompts: [[605, 290], [5], [6]]")


def opened(*changes: tuple[str, str]) -> Contract:
    found = validate.validate(document.parse(broken(ONE_BACKEND, *changes), "thing-v1.yaml"))
    assert found is not None
    return found


def evidence(contract: Contract, *outcomes: str, stale: bool = False, **about: Any) -> Evidence:
    """Evidence for each test of a contract, made up."""
    results = []
    for test, outcome in zip(contract.falsification_tests, outcomes, strict=True):
        assert test.measure is not None
        [name] = test.measure.threshold
        figures = {"passed": {name: 0.0}, "failing": {name: 6.0}}.get(outcome, {})
        reason = {"failing": f"{name} is 6, expected ≤ 0", "not run": "no such model"}
        kind: Any = outcome
        results.append(
            Result(
                test.id,
                test.measure.kind,
                kind,
                reason.get(outcome, ""),
                described(test),
                figures,
                about if outcome == "failing" or "flipped" in about else {},
            )
        )
    return Evidence(
        contract="thing-v1",
        contract_version="1.1.0",
        created="2026-03-04T00:00:00+00:00",
        backend="cpu",
        device="a CPU",
        driver=None,
        machine={},
        model={"name": "m.gguf", "sha256": "0" * 64, "layers": 8, "vocabulary": 100},
        seed=1,
        commit="abc",
        code="0" * 64 if stale else code_digest(code_of(contract, "cpu")),
        numerics=numerics.VERSION,
        activation_bits=16,
        results=results,
    )


def standing(contract: Contract, *files: Evidence) -> status.Status:
    return status.status(contract, "thing-v1", files)


def placed(folder: Path, *outcomes: str, changes: tuple[tuple[str, str], ...] = (), **about: Any):
    """A contract in a folder, its evidence beside it."""
    path = folder / "thing-v1.yaml"
    path.write_text(broken(ONE_BACKEND, *changes))
    if outcomes:
        evidence(opened(*changes), *outcomes, **about).save(folder / "evidence/thing-v1")
    return path


@pytest.mark.parametrize(
    ("claimed", "outcomes", "allowed"),
    [
        ("ACTIVE_RUNTIME", ("passed", "passed"), True),
        ("ACTIVE_RUNTIME", ("passed", "failing"), False),
        ("ACTIVE_RUNTIME", ("passed", "not run"), False),
        ("ACTIVE_ALGORITHM_LEVEL", ("passed", "passed"), True),
        ("ACTIVE_ALGORITHM_LEVEL", ("passed", "not run"), False),
        ("ACTIVE_ALGORITHM_LEVEL", ("passed", "failing"), False),
        ("ACTIVE", ("passed", "passed"), True),
        ("ACTIVE", ("passed", "not run"), False),
        ("ACTIVE", ("passed", "failing"), False),
        ("ACTIVE_ALGORITHM_LEVEL_WITH_DOCUMENTED_DIVERGENCE", ("passed", "failing"), True),
        ("ACTIVE_ALGORITHM_LEVEL_WITH_DOCUMENTED_DIVERGENCE", ("failing", "failing"), False),
        ("ACTIVE_ALGORITHM_LEVEL_WITH_DOCUMENTED_DIVERGENCE", ("failing", "not run"), False),
        ("ACTIVE_ALGORITHM_LEVEL_WITH_DOCUMENTED_DIVERGENCE", ("passed", "passed"), False),
        ("DRAFT", ("failing", "failing"), True),
        ("DEPRECATED", ("failing", "not run"), True),
    ],
)
def test_a_status_is_what_evidence_allows(
    claimed: str, outcomes: tuple[str, ...], allowed: bool, tmp_path: Path
) -> None:
    path = placed(tmp_path, *outcomes, changes=(("ACTIVE_RUNTIME", "PROPOSED"),))
    before = path.read_bytes()
    argv = ["contract", "amend", str(path), "--status", claimed]
    assert main(argv) == (0 if allowed else 1)
    assert (path.read_bytes() == before) is not allowed
    if allowed:
        assert document.read(path).data["status"] == claimed


def test_a_refusal_names_the_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = placed(tmp_path, "failing", "not run")
    argv = ["contract", "amend", str(path), "--title", "All discharged", "--status"]
    assert main([*argv, "ACTIVE_RUNTIME"]) == 1
    said = capsys.readouterr().err
    assert "cpu, AC_THING_001, FALSIFY-001: failing: differing_values is 6, expected ≤ 0" in said
    assert "cpu, AC_THING_002, FALSIFY-002: not run: no such model" in said
    assert main([*argv, "DISCHARGED_BY_ME"]) == 2
    assert "expected one of DRAFT" in capsys.readouterr().err
    # nor does a status stay that fresh evidence denies
    assert main(argv[:-1]) == 1
    assert "denies it" in capsys.readouterr().err
    # nor can one be typed into the file
    assert main(["contract", "lint", str(path)]) == 1
    found = capsys.readouterr().out
    assert (
        "error[status-contradicted]: expected what the evidence allows, which denies ACTIV" in found
    )
    assert "which denies M-0 is SHIPPED: cpu, AC_THING_001, FALSIFY-001: failing" in found
    assert main([*argv, "DRAFT"]) == 0


def test_stale_evidence_shows_nothing_and_denies_nothing() -> None:
    contract = opened()
    old = standing(contract, evidence(contract, "failing", "passed", stale=True))
    assert claims.divergences(old) == {}
    for claimed in STATUSES[2:6]:
        assert claims.denials(old, claimed) == []
        assert sum("stale: the code has changed" in x for x in claims.missing(old, claimed)) == 2


ALGORITHM, RUNTIME = "ACTIVE_ALGORITHM_LEVEL", "ACTIVE_RUNTIME"


def test_the_algorithm_holds_on_one_backend_and_the_runtime_on_all() -> None:
    found = validate.validate(document.parse(GOOD, "thing-v1.yaml"))
    assert found is not None
    on_one = standing(found, evidence(found, "passed", "passed"))
    assert claims.missing(on_one, ALGORITHM) == []
    not_run = ["cuda, AC_THING_002, FALSIFY-002: not run: there is no evidence"]
    assert claims.missing(on_one, RUNTIME) == claims.missing(on_one, "ACTIVE") == not_run
    one_row = standing(found, evidence(found, "passed", "not run"))
    assert [x[:18] for x in claims.missing(one_row, ALGORITHM)] == [
        "cpu, AC_THING_002,",
        "cuda, AC_THING_002",
    ]


def test_speed_is_none_of_the_algorithm_s() -> None:
    contract = opened(
        ("kind: invariant", "kind: throughput"),
        ("      prompts: [[605, 290]]\n", ""),
        ("nonfinite_values: {at_most: 0}", "ratio_to_peer: {at_least: 2}"),
    )
    found = standing(contract, evidence(contract, "passed", "not run"))
    assert claims.missing(found, ALGORITHM) == []
    assert [x[:17] for x in claims.missing(found, RUNTIME)] == ["cpu, AC_THING_002"]


def test_every_status_claims_something_or_is_said_to_claim_nothing() -> None:
    contract = opened()
    bad = standing(contract, evidence(contract, "failing", "failing"))
    silent = [s for s in STATUSES if not claims.denials(bad, s)]
    assert silent == ["DRAFT", "PROPOSED", "SUPERSEDED", "DEPRECATED"]


def test_evidence_of_another_model_says_nothing_of_the_sample() -> None:
    needs = ("      kind: invariant\n", "      kind: invariant\n      model: {sample: true}\n")
    contract = opened(needs)
    found = evidence(contract, "passed", "passed")
    other = standing(contract, found)
    assert [row.state("cpu") for row in other.rows] == ["discharged", "not run"]
    assert "expected the sample model, got m.gguf" in status_report.markdown(other)
    found.model["sha256"] = sample_digest()
    assert [row.state("cpu") for row in standing(contract, found).rows] == ["discharged"] * 2


def test_a_status_that_is_nobody_s_is_a_claim_too() -> None:
    changes = ("ACTIVE_RUNTIME", "DISCHARGED_BY_ME")
    bad = standing(opened(changes), evidence(opened(changes), "failing", "passed"))
    assert "DISCHARGED_BY_ME, which the evidence denies: cpu, AC_THING_001" in (
        status_report.markdown(bad)
    )
    assert claims.denials(bad, "draft") == []


def test_a_stage_is_not_shipped_while_what_it_discharges_fails() -> None:
    contract = opened(("ACTIVE_RUNTIME", "DRAFT"))
    bad = standing(contract, evidence(contract, "passed", "failing"))
    [line] = claims.denied_stages(bad)
    assert line.startswith("M-0 is SHIPPED: cpu, AC_THING_002, FALSIFY-002: failing")
    assert line in status_report.markdown(bad)
    assert line in str(status_report.to_json(bad)["denied_stages"])
    fine = standing(contract, evidence(contract, "passed", "passed"))
    assert claims.denied_stages(fine) == []
    pending = opened(("ACTIVE_RUNTIME", "DRAFT"), ("status: SHIPPED", "status: PENDING"))
    assert claims.denied_stages(standing(pending, evidence(pending, "passed", "failing"))) == []


@pytest.mark.parametrize(
    ("flipped", "typed", "code", "written"),
    [
        ([1], None, 0, "KNOWN_DIVERGENCE_NOT_BENIGN"),
        ([], None, 0, "KNOWN_DIVERGENCE_BENIGN"),
        ([1], "KNOWN_DIVERGENCE_NOT_BENIGN", 0, "KNOWN_DIVERGENCE_NOT_BENIGN"),
        ([1], "KNOWN_DIVERGENCE_BENIGN", 1, None),
        ([1], "KNOWN_LIMITATION_BENIGN", 1, None),
        ([], "KNOWN_DIVERGENCE_NOT_BENIGN", 1, None),
        ([], "KNOWN_DIVERGENCE_BENIGN", 0, "KNOWN_DIVERGENCE_BENIGN"),
        ([], "FINE", 2, None),
    ],
)
def test_a_class_of_divergence_is_what_prompts_did(
    flipped: list[int],
    typed: str | None,
    code: int,
    written: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes = (PROMPTS, ("ACTIVE_RUNTIME", "PROPOSED"))
    path = placed(tmp_path, "passed", "failing", changes=changes, flipped=flipped)
    argv = ["contract", "amend", str(path), *(["--divergence", typed] if typed else [])]
    assert main(argv) == code
    said = capsys.readouterr().err
    data = document.read(path).data
    first, second = data["proof_obligations"]
    assert "divergence" not in first
    assert second.get("divergence") == written
    count = f"of 4 prompts tried, {'none' if not flipped else 1} flipped"
    if written is None:
        assert count in said or typed == "FINE"
        return
    entry = data["metadata"]["amendment_history"][0]
    assert entry["divergence"] == written
    assert count in " ".join(entry["description"].split())
    assert main(["contract", "validate", str(path)]) == 0
    capsys.readouterr()
    assert main(["contract", "status", str(path)]) == 0
    out = capsys.readouterr().out
    assert f"AC_THING_002: Finite. [{written}]" in out
    assert count in out.lower()
    page = tmp_path / "status.html"
    assert main(["contract", "status", str(path), "--html", str(page)]) == 0
    assert count in page.read_text().lower()


@pytest.mark.parametrize("typed", ["KNOWN_DIVERGENCE_BENIGN", "KNOWN_LIMITATION_BENIGN"])
def test_a_class_cannot_be_typed_against_what_prompts_did(
    typed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = ("property: Finite.", f"property: Finite.\n    divergence: {typed}")
    changes = (PROMPTS, mark, ("ACTIVE_RUNTIME", f"{ALGORITHM}_WITH_DOCUMENTED_DIVERGENCE"))
    changes += (("status: SHIPPED", "status: PENDING"),)
    path = placed(tmp_path, "passed", "failing", changes=changes, flipped=[])
    assert main(["contract", "lint", str(path)]) == 0
    capsys.readouterr()
    path = placed(tmp_path, "passed", "failing", changes=changes, flipped=[1])
    assert main(["contract", "lint", str(path)]) == 1
    at = 1 + path.read_text()[: path.read_text().index(typed)].count("\n")
    expected = f"{path}:{at}:17: error[status-contradicted]: expected KNOWN_DIVERGENCE_NOT_BENIGN"
    assert expected in capsys.readouterr().out


def test_a_class_of_what_does_not_fail_shows_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    claimed = f"{ALGORITHM}_WITH_DOCUMENTED_DIVERGENCE"
    mark = ("property: Finite.", "property: Finite.\n    divergence: KNOWN_DIVERGENCE_BENIGN")
    for outcome in ("not run", "passed"):
        contract = opened(mark)
        found = standing(contract, evidence(contract, "passed", outcome))
        lacking = claims.missing(found, claimed)
        assert lacking[0].startswith("no obligation diverges")
        assert [x[:18] for x in lacking[1:]] == ["cpu, AC_THING_002,"] * (outcome == "not run")
    path = placed(tmp_path, "passed", "passed", changes=(mark, ("ACTIVE_RUNTIME", claimed)))
    assert main(["contract", "status", str(path), "--gate"]) == 1
    assert "the evidence does not show it: no obligation diverges" in capsys.readouterr().err


def test_a_gate_does_not_pass_on_another_contract_s_evidence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, empty = placed(tmp_path, "passed", "passed"), tmp_path / "empty-v1.yaml"
    text = GOOD[: GOOD.index("proof_obligations")] + GOOD[GOOD.index("falsification_tests") :]
    tests = "falsification_tests:\n  - {id: T, prediction: p, if_fails: f, test: t}\n"
    empty.write_text(text[: text.index("falsification_tests")] + tests)
    assert main(["contract", "status", str(good), "--gate"]) == 0
    assert main(["contract", "status", str(good), str(empty), "--gate"]) == 6
    said = capsys.readouterr().err
    assert "thing: expected an obligation that is discharged, found none" in said


def test_a_folder_of_evidence_that_is_named_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = placed(tmp_path, "passed", "passed")
    for action in (["status"], ["amend", "--dry-run"]):
        argv = ["contract", *action, str(path), "--evidence", str(tmp_path / "evidenc")]
        assert main(argv) == 2
        assert "--evidence: expected a folder, got" in capsys.readouterr().err


def test_nothing_is_benign_of_which_no_prompt_was_tried(tmp_path: Path) -> None:
    path = placed(tmp_path, "passed", "failing", changes=(("ACTIVE_RUNTIME", "PROPOSED"),))
    assert main(["contract", "amend", str(path), "--divergence", "KNOWN_DIVERGENCE_BENIGN"]) == 1
    assert main(["contract", "amend", str(path)]) == 0
    assert document.read(path).data["proof_obligations"][1]["divergence"].endswith("NOT_BENIGN")


@pytest.mark.parametrize(
    "measure",
    [
        "kind: accuracy",  # held to the oracle, not to another backend
        "kind: invariant\n      activation_bits: 8",
        "kind: invariant\n      model: {layers: 8}",  # measured on another file, below
    ],
)
def test_prompts_between_other_sides_make_nothing_benign(measure: str, tmp_path: Path) -> None:
    changes = [("kind: invariant", measure), ("backends: [cpu, cuda]", "backends: [cpu]")]
    if "accuracy" in measure:
        changes.append(("nonfinite_values", "mean_kl"))
    changes.append(("ACTIVE_RUNTIME", "PROPOSED"))
    text = broken(*changes)
    contract = validate.validate(document.parse(text, "thing-v1.yaml"))
    assert contract is not None
    both = evidence(contract, "passed", "failing", flipped=[])
    parity, failing = both.results
    files = [
        replace(both, results=[parity]),
        replace(both, results=[replace(failing, about={})]),
    ]
    if "layers" in measure:
        files[1] = replace(files[1], model=both.model | {"sha256": "1" * 64})
    else:
        files = [replace(both, results=[parity, replace(failing, about={})])]
    found = standing(contract, *files)
    assert found.flips == status.Flips(1, 0)
    assert claims.divergences(found)["AC_THING_002"] == "KNOWN_DIVERGENCE_NOT_BENIGN"
    with pytest.raises(GateFailed, match="AC_THING_002: no prompt was tried on two sides"):
        claims.divergences(found, "KNOWN_DIVERGENCE_BENIGN")


def test_each_obligation_has_the_class_of_its_own_failure() -> None:
    contract = opened(("kind: invariant", "kind: accuracy"), ("nonfinite_values", "mean_kl"))
    found = standing(contract, evidence(contract, "failing", "failing"))
    assert set(claims.divergences(found).values()) == {"KNOWN_DIVERGENCE_NOT_BENIGN"}
    both = evidence(contract, "failing", "failing")
    flips = [replace(r, about={"flipped": f}) for r, f in zip(both.results, ([], [0]), strict=True)]
    found = standing(contract, replace(both, results=flips))
    assert claims.divergences(found, "KNOWN_DIVERGENCE_NOT_BENIGN") == {
        "AC_THING_001": "KNOWN_DIVERGENCE_BENIGN",
        "AC_THING_002": "KNOWN_DIVERGENCE_NOT_BENIGN",
    }
    with pytest.raises(GateFailed, match="AC_THING_002: of 1 prompts tried, 1 flipped"):
        claims.divergences(found, "KNOWN_DIVERGENCE_BENIGN")


def test_a_class_goes_with_its_failure(tmp_path: Path) -> None:
    mark = ("property: Finite.", "property: Finite.\n    divergence: KNOWN_DIVERGENCE_NOT_BENIGN")
    changes = (mark, ("ACTIVE_RUNTIME", "PROPOSED"))
    path = placed(tmp_path, changes=changes)
    assert main(["contract", "amend", str(path)]) == 0  # nothing is known: it stays
    assert "divergence: KNOWN_DIVERGENCE_NOT_BENIGN" in path.read_text()
    path = placed(tmp_path, "passed", "passed", changes=changes)
    assert main(["contract", "amend", str(path), "--status", "ACTIVE_RUNTIME"]) == 0
    assert "divergence" not in document.read(path).data["proof_obligations"][1]
    said = document.read(path).data["metadata"]["amendment_history"][0]["description"]
    assert "AC_THING_002: KNOWN_DIVERGENCE_NOT_BENIGN becomes none" in " ".join(said.split())
    assert main(["contract", "lint", str(path)]) == 0


def test_an_amendment_is_drafted_from_evidence(tmp_path: Path) -> None:
    path = placed(tmp_path, "passed", "failing", changes=(("ACTIVE_RUNTIME", "PROPOSED"),))
    argv = ["contract", "amend", str(path), "--description", "We looked.", "--status", "DRAFT"]
    assert main(argv) == 0
    entry = document.read(path).data["metadata"]["amendment_history"][0]
    assert entry["title"] == "1 discharged, 0 stale, 0 not run, 1 failing"
    text = " ".join(entry["description"].split())
    assert text.startswith("We looked. Measured: 1 discharged")
    for said in (
        "Status: PROPOSED becomes DRAFT.",
        "cpu, AC_THING_001, FALSIFY-001: discharged: differing_values 0.",
        "cpu, AC_THING_002, FALSIFY-002: failing: nonfinite_values is 6, expected ≤ 0.",
        "Divergence of AC_THING_002: none becomes KNOWN_DIVERGENCE_NOT_BENIGN.",
        "m.gguf (000000000000), commit abc.",
    ):
        assert said in text, said


def test_the_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for outcomes, code in (
        (("passed", "passed"), 0),
        (("passed", "failing"), 1),
        (("passed", "not run"), 6),
        ((), 6),
    ):
        argv = ["contract", "status", str(placed(tmp_path, *outcomes)), "--gate"]
        for old in [] if outcomes else (tmp_path / "evidence/thing-v1").iterdir():
            old.unlink()
        assert main(argv) == code, outcomes
        assert main(argv[:-1]) == 0
    contract = opened()
    evidence(contract, "passed", "passed", stale=True).save(tmp_path / "evidence/thing-v1")
    assert main(argv) == 1
    assert "0 failing and 2 stale rows" in capsys.readouterr().err


def test_a_status_in_the_metadata_is_read(tmp_path: Path) -> None:
    moved = (("status: ACTIVE_RUNTIME\n", ""), ("  kind: kernel\n", "  status: ACTIVE_RUNTIME\n"))
    assert opened(*moved).declared == "ACTIVE_RUNTIME"
    path = placed(tmp_path, "passed", "failing", changes=moved)
    assert main(["contract", "amend", str(path)]) == 1
    assert main(["contract", "amend", str(path), "--status", "DRAFT"]) == 0
    data = document.read(path).data
    assert (data["metadata"]["status"], "status" in data) == ("DRAFT", False)


def test_tokens_that_differ_in_spaces_alone_are_shown_so() -> None:
    contract = opened()
    found = evidence(contract, "passed", "failing")
    texts = replace(found.results[1], reason="'   ' (261),\n '       ' (265) | <b>")
    bad = standing(contract, replace(found, results=[found.results[0], texts]))
    table = status_report.markdown(bad)
    assert "failing: '   ' (261), '       ' (265) \\| &lt;b>" in table


def test_a_status_that_nothing_shows_is_shown_as_such() -> None:
    contract = opened()  # somebody typed ACTIVE_RUNTIME
    silent = standing(contract)
    assert "ACTIVE_RUNTIME, which the evidence does not show" in status_report.markdown(silent)
    assert len(status_report.to_json(silent)["not_shown"]) == 2
    fine = standing(contract, evidence(contract, "passed", "passed"))
    assert "Declared: ACTIVE_RUNTIME. Measured:" in status_report.markdown(fine)
    assert status_report.to_json(fine)["not_shown"] == []


def test_a_typed_status_that_nothing_shows_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not an error: evidence goes stale with any change to the code."""
    warning = "which the evidence does not show: cpu, AC_THING_001, FALSIFY-001: "

    def linted(path: Path) -> str:
        assert main(["contract", "lint", str(path)]) == 0
        return capsys.readouterr().out

    said = linted(placed(tmp_path))
    assert "warning[status-not-shown]: expected what the evidence shows, got ACTIVE_RU" in said
    assert f"{warning}not run: there is no evidence" in said
    assert "0 error(s), 0 warning(s)" in linted(
        placed(tmp_path, changes=(("status: ACTIVE_RUNTIME", "status: PROPOSED"),))
    )
    stale = placed(tmp_path, "passed", "passed", stale=True)
    assert f"{warning}stale: the code has changed" in linted(stale)
    assert "0 error(s), 0 warning(s)" in linted(placed(tmp_path, "passed", "passed"))


def test_a_denied_status_is_shown_as_denied() -> None:
    contract = opened()
    bad = standing(contract, evidence(contract, "passed", "failing"))
    said = "Declared: ACTIVE_RUNTIME, which the evidence denies: cpu, AC_THING_002"
    assert said in status_report.markdown(bad)
    assert said in status_report.html([bad])
    assert len(status_report.to_json(bad)["denied_by"]) == 1
    good = standing(contract, evidence(contract, "passed", "passed"))
    assert "Declared: ACTIVE_RUNTIME. Measured" in status_report.markdown(good)


def test_evidence_of_another_model_is_not_run() -> None:
    contract = opened(("      against: reference\n", "      model: {layers: 48}\n"))
    [row, _] = standing(contract, evidence(contract, "passed", "passed")).rows
    [cell] = row.cells["cpu"]
    assert (cell.state, cell.why) == ("not run", "model: expected one with layers 48, got 8")


def test_older_evidence_says_what_was_flipped_too() -> None:
    kind = ("kind: invariant", "kind: argmax"), ("nonfinite_values", "changed_prompts")
    contract = opened(*kind, PROMPTS)
    tokens = [[1, 1], [2, 3], [4, 4]]
    found = standing(contract, evidence(contract, "passed", "failing", next_tokens=tokens))
    assert str(found.flips) == "of 3 prompts tried, 1 flipped"


def test_the_written_json_is_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = placed(tmp_path, "passed", "failing", flipped=[0])
    assert main(["contract", "status", str(path), "--json"]) == 0
    [shown] = json.loads(capsys.readouterr().out)
    assert shown["prompts"] == {"tried": 2, "flipped": 2}
    assert shown["denied_by"]
    assert path.read_text() != GOOD


def test_a_contract_that_measures_nothing_is_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = broken()
    head, tail = (
        text[: text.index("    measure:\n      kind: parity")],
        text[text.index("qa_gate:") :],
    )
    path = tmp_path / "thing-v1.yaml"
    path.write_text(head + "    test: look at it\n" + tail.replace("All 2", "All 1"))
    assert main(["contract", "status", str(path)]) == 0
    out = capsys.readouterr().out
    assert "| AC_THING_001: Same bits. | not run |" in out
    assert "0 discharged, 0 stale, 2 not run, 0 failing" in out
    assert "FALSIFY-001: not run: it has no measure" in out
    assert main(["contract", "status", str(path), "--gate"]) == 6
    assert main(["contract", "check", str(path)]) == 6
    assert main(["contract", "amend", str(path), "--status", "ACTIVE_RUNTIME"]) == 1


def test_a_measure_beside_words_does_not_discharge_them() -> None:
    """An obligation with two tests holds as far as both were run."""
    words = (
        "qa_gate:",
        "  - id: FALSIFY-003\n    rule: r\n    prediction: p\n    if_fails: f\n    test: look\n"
        "    discharges: [AC_THING_001]\nqa_gate:",
    )
    contract = opened(words)
    measured = contract.model_copy(update={"falsification_tests": contract.falsification_tests[:2]})
    [row, _] = standing(contract, evidence(measured, "passed", "passed")).rows
    assert row.state("cpu") == "not run"


def test_a_failure_of_a_test_that_serves_nothing_is_shown() -> None:
    contract = opened(("    discharges: [AC_THING_002]\n", ""))
    found = standing(contract, evidence(contract, "passed", "failing"))
    assert (found.rows[-1].id, found.rows[-1].state("cpu")) == ("FALSIFY-002", "failing")
    assert found.count("failing") == 1
