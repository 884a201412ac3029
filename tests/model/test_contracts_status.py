"""Evidence, and the status that comes from it alone."""

import dataclasses
import json
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isobit.cli import main
from isobit.contracts import check as checking
from isobit.contracts import evidence, status, status_report
from isobit.contracts.check import check, select
from isobit.contracts.evidence import Evidence
from isobit.contracts.schema import Contract
from isobit.errors import FileRefused, NotRun, UsageError
from isobit.verify.faults import one_ulp
from tests.helpers.contracts import PROMPTS, Make, broken, contract, measure, stage


def found(model: Path, text: Contract, **settings: Any) -> Evidence:
    return check(text, Path("thing-v1.yaml"), model, "cpu", **settings)


def cell(text: Contract, *files: Evidence) -> str | None:
    return status.status(text, "thing-v1", files).rows[0].state("cpu")


def test_evidence_says_what_was_measured_on_what(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence, "commit", lambda: None)
    e = found(small_model, contract(measure("parity"), measure("argmax")), seed=7, commit="abc")
    assert (e.seed, e.commit, e.numerics, e.backend) == (7, "abc", 1, "cpu")
    assert e.model["layers"] == 2
    assert len(e.model["sha256"]) == 64
    assert e.device
    assert Evidence.load(e.save(tmp_path / "a/b")) == e
    assert [f.name for f in (tmp_path / "a/b").iterdir()] == ["cpu-small.json"]
    assert evidence.load_all(tmp_path / "a/b") == [e]
    assert evidence.load_all(tmp_path / "none") == []


def test_a_commit_is_that_of_the_code_and_cannot_be_typed(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = contract(measure("argmax"))
    monkeypatch.setattr(evidence, "commit", lambda: "of-the-repository")
    assert found(small_model, text, commit="typed").commit == "of-the-repository"
    monkeypatch.undo()
    git = shutil.which("git") or pytest.skip("no git here")
    ours, installed = tmp_path / "src" / "isobit", tmp_path / ".venv" / "isobit"
    for folder in (ours, installed):
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
    named = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for line in (["init", "-q"], ["add", "src"], [*named, "commit", "-qm", "first"]):
        subprocess.run([git, "-C", str(tmp_path), *line], check=True)
    monkeypatch.setattr(evidence, "_PACKAGE", ours)
    assert len(evidence.commit() or "") == 12
    (ours / "__init__.py").write_text("1")
    assert (evidence.commit() or "").endswith("+")
    monkeypatch.setattr(evidence, "_PACKAGE", installed)  # beside other code, or of another day
    assert evidence.commit() is None


def test_evidence_is_stale_when_the_text_that_was_measured_changes(
    small_model: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "a.txt").write_text("a b c " * 40)
    with_text = measure("accuracy", "text: a.txt, tokens: 9", "mean_kl: {at_most: 5}")
    text = contract(with_text.replace(f"prompts: {PROMPTS}, ", ""), measure("argmax"))
    path = tmp_path / "thing-v1.yaml"
    good = check(text, path, small_model, "cpu", tests=select(text, ["T0"]))
    assert [r.outcome for r in good.results] == ["passed"]

    def state() -> tuple[str, str]:
        tests = status.status(text, "thing-v1", [good], tmp_path).rows[0].cells["cpu"]
        return tests[0].state, tests[0].why

    assert state()[0] == "discharged"
    (tmp_path / "a.txt").write_text(str(rng.integers(1 << 60)))
    assert state()[0] == "stale"
    assert state()[1].startswith("the code or the text has changed since it passed")
    (tmp_path / "a.txt").unlink()
    assert state()[0] == "stale"


def test_evidence_says_nothing_of_another_model_or_device(small_model: Path) -> None:
    text = contract(measure("parity", "model: {layers: 2}, device: {name: CPU}"))
    e = found(small_model, text)
    device = dataclasses.replace(e, device="a CPU")  # whatever this machine's is called
    [of] = e.results
    passed = dataclasses.replace(
        device,
        results=[dataclasses.replace(of, outcome="passed", reason="", figures=NOTHING)],
    )
    assert cell(text, passed) == "discharged"
    assert cell(text, dataclasses.replace(passed, device="H100")) == "not run"
    assert cell(text, dataclasses.replace(passed, device=None)) == "not run"
    unsaid = {k: v for k, v in passed.model.items() if k != "layers"}
    assert cell(text, dataclasses.replace(passed, model=unsaid)) == "not run"


NOTHING = {"differing_values": 0.0, "layers_below_cosine_0_99": 0.0}


def test_what_evidence_notes_may_be_anything(small_model: Path) -> None:
    text = contract(measure("argmax"))
    e = found(small_model, text)
    for pairs in ([[[1], [2]]], [[], [{}], 3, None], "x", {"a": 1}, [[float("nan")]]):
        odd = dataclasses.replace(e.results[0], about={"next_tokens": pairs})
        assert cell(text, dataclasses.replace(e, results=[odd])) == "discharged"
    shown = dataclasses.replace(e, device="\x1b[2J", driver="\x07")
    table = status_report.markdown(status.status(text, "thing-v1", [shown]))
    assert "\\x1b[2J, driver \\x07" in table


def test_evidence_that_cannot_be_written_leaves_what_was_there(
    small_model: Path, tmp_path: Path
) -> None:
    e = found(small_model, contract(measure("argmax")))
    path = e.save(tmp_path)
    before = path.read_bytes()
    with pytest.raises(UsageError, match="cannot write the evidence"):
        dataclasses.replace(e, machine={"x": float("nan")}).save(tmp_path)
    assert path.read_bytes() == before


def test_damaged_evidence_is_refused(small_model: Path, tmp_path: Path) -> None:
    path = found(small_model, contract(measure("argmax"))).save(tmp_path)
    good = json.loads(path.read_text())
    for damaged in (
        "",
        "[" * 100_000,
        "[]",
        "{}",
        json.dumps(good | {"format": 2}),
        json.dumps(good | {"results": 3}),
        json.dumps(good | {"results": [{}]}),
        json.dumps(good | {"more": 1}),
        json.dumps({k: v for k, v in good.items() if k != "seed"}),
        json.dumps(good | {"results": [good["results"][0] | {"outcome": "DISCHARGED"}]}),
        json.dumps(good | {"results": [good["results"][0] | {"figures": {"x": "0"}}]}),
        *(json.dumps(good | {name: odd}) for name in good for odd in ([[]], True)),
        *(
            json.dumps(good | {"results": [good["results"][0] | {name: odd}]})
            for name in good["results"][0]
            for odd in (None, [[]], True)
        ),
    ):
        path.write_text(damaged)
        with pytest.raises(FileRefused, match="expected"):
            Evidence.load(path)


def test_a_status_comes_from_evidence_alone(
    small_model: Path, on_cpu: Callable[[Make], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = contract(measure("parity"), measure("argmax"))
    assert text.status == "ACTIVE_RUNTIME"
    assert cell(text) == "not run"
    good = found(small_model, text)
    assert cell(text, good) == "discharged"
    half = found(small_model, text, tests=select(text, ["T1"]))
    assert cell(text, half) == "not run"
    other = contract(measure("parity"), measure("argmax").replace("[5, 6", "[5, 7"))
    assert cell(other, good) == "stale"
    old = dataclasses.replace(good, code="0" * 64)
    assert cell(text, old) == "stale"
    assert cell(text, old, good) == "discharged"
    assert cell(text, dataclasses.replace(good, numerics=0)) == "stale"
    assert cell(text, dataclasses.replace(good, contract="another")) == "not run"
    figures = {"differing_values": 0.0, "layers_below_cosine_0_99": 0.0}
    for figures in ({}, *(figures | {"differing_values": x} for x in (1.0, -1.0, -math.inf))):
        typed = dataclasses.replace(good.results[0], figures=figures)
        by_hand = dataclasses.replace(good, results=[typed, good.results[1]])
        assert cell(text, by_hand) == "failing"  # whatever "outcome" says
    loose = contract(measure("parity", threshold="least_layer_cosine: {at_least: -1}"))
    typed = dataclasses.replace(
        good.results[0],
        measure=checking.described(loose.falsification_tests[0]),
        figures={"least_layer_cosine": 1.0},
    )
    assert cell(loose, dataclasses.replace(good, results=[typed])) == "not run"
    on_cpu(stage("attn_norm", 1, one_ulp(np.random.default_rng(0))))
    bad = found(small_model, text)
    assert cell(text, good, bad) == "failing"
    assert cell(text, dataclasses.replace(bad, code="0" * 64), good) == "discharged"


def test_the_digest_follows_the_code_it_speaks_of(monkeypatch: pytest.MonkeyPatch) -> None:
    digest = evidence.code_digest.__wrapped__
    now = digest(frozenset({"cpu"}))
    assert now == digest(frozenset({"cpu"}))
    assert now != digest(frozenset({"cpu", "reference"}))
    touched: set[str] = set()
    read = Path.read_bytes

    def changed(path: Path) -> bytes:
        touched.add(path.as_posix())
        return read(path) + (b" " if path.name == "matmul.h" else b"")

    monkeypatch.setattr(Path, "read_bytes", changed)
    assert digest(frozenset({"cpu"})) != now
    parts = {p.split("/isobit/")[-1] for p in touched}
    assert {"numerics/scalar.h", "backends/cpu/engine/engine.cpp", "runtime/model.py"} <= parts
    assert {"verify/compare.py", "contracts/measure.py"} <= parts
    assert not any(p.startswith(("backends/cuda", "backends/wgpu", "cli")) for p in parts)
    assert any(p.endswith(".cu") for p in map(str, evidence._files(["backends/cuda"])))
    assert any(p.endswith(".wgsl") for p in map(str, evidence._files(["backends/wgpu"])))


def test_the_digest_covers_what_is_compared_with() -> None:
    text = contract(measure("argmax", "against: cuda"))
    assert checking.code_of(text, "cpu") == {"cpu", "cuda"}
    assert checking.code_of(contract(measure("invariant")), "cpu") == {"cpu", "reference"}


def test_status_is_written_as_table_and_page(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "thing-v1.yaml"
    path.write_text(broken(("property: Finite.", "property: 'Finite | <b>'")))
    argv = ["contract", "check", str(path), "--model", str(small_model), "--tests", "FALSIFY-002"]
    assert main([*argv, "--backends", "cpu"]) == 6  # its tokens are none of this model's
    assert not (tmp_path / "evidence").exists()
    path.write_text(path.read_text().replace("605, 290", "5, 6"))
    assert main([*argv, "--backends", "cpu"]) == 0
    assert not (tmp_path / "evidence").exists()
    assert main([*argv[:-2], "--backends", "cpu", "--seed", "3"]) == 6
    capsys.readouterr()
    page, table = tmp_path / "s.html", tmp_path / "s.md"
    assert main(["contract", "status", str(path), "--html", str(page), "-o", str(table)]) == 0
    text = table.read_text("utf-8")
    assert "| obligation | cpu | cuda |" in text
    assert "| AC_THING_002: Finite \\| &lt;b> | discharged | not run |" in text
    assert "- cpu, AC_THING_001, FALSIFY-001: not run: " in text
    assert "<b>'" not in page.read_text("utf-8")
    assert '<td class="discharged" ' in page.read_text("utf-8")
    assert main(["contract", "status", str(path), "--json"]) == 0
    [shown] = json.loads(capsys.readouterr().out)
    assert shown["obligations"][1]["backends"]["cpu"]["state"] == "discharged"


def test_exit_codes(
    small_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    on_cpu: Callable[[Make], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "thing-v1.yaml"
    path.write_text(broken(("[[605, 290, 948]]", "[[5, 6, 7]]"), ("605, 290", "5, 6")))
    argv = ["contract", "check", str(path), "--model", str(small_model)]
    monkeypatch.setattr("isobit.backends.cuda.available", lambda: (False, "none here"))
    assert main([*argv, "--backends", "cpu"]) == 0
    assert main(argv) == 6
    assert main([*argv, "--backends", "wgpu"]) == 2
    assert main([*argv, "--tests", "FALSIFY-009"]) == 2
    with monkeypatch.context() as before_the_run:
        before_the_run.setattr(checking, "check", lambda *_, **__: pytest.fail("it was run"))
        assert main([*argv, "--evidence", str(path)]) == 2
        assert main([*argv, "--evidence", str(path / "within")]) == 2
    assert main([*argv, "--tests", "FALSIFY-001", "--backends", "cuda"]) == 2
    for ids, said in (("BOGUS", "expected tests with a"), ("FALSIFY-001,FALSIFY-002", "left")):
        capsys.readouterr()
        assert main([*argv, "--without", ids]) == 2
        complaint = capsys.readouterr().err
        assert "error: --without: " in complaint
        assert said in complaint
    assert main([*argv, "--without", "FALSIFY-002"]) == 0
    assert main([*argv, "--without", "FALSIFY-001"]) == 6
    assert main([*argv[:3], "--model", str(tmp_path / "absent.gguf")]) == 6
    on_cpu(stage("attn_norm", 1, one_ulp(np.random.default_rng(0))))
    assert main(argv) == 1
    path.write_text("metadata: [")
    assert main(argv) == 3


def test_what_is_measured_can_be_chosen(small_model: Path) -> None:
    text = contract(measure("argmax"), measure("parity"), measure("invariant"))
    assert [t.id for t in select(text)] == ["T0", "T1", "T2"]
    assert [t.id for t in select(text, ["T2", "T1"])] == ["T1", "T2"]
    assert [t.id for t in select(text, without=["T1"])] == ["T0", "T2"]
    for some in (["T0", "X"], []), ([], ["X"]):
        with pytest.raises(UsageError, match="got 'X'"):
            select(text, *some)
    with pytest.raises(UsageError, match="found none"):
        select(text, ["T1"], ["T1"])
    with pytest.raises(NotRun, match="nothing can be run"):
        select(text.model_copy(update={"falsification_tests": []}))
    with pytest.raises(UsageError, match="wgpu: expected a test"):
        check(text, Path("x.yaml"), small_model, "wgpu")
