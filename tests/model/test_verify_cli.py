"""The comparing commands as people call them, in process, on the sample model."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest

from isobit.cli import main, tools

TOKENS = "605,290,948,268,624,475"
DOCUMENT = Path(__file__).parents[2] / "docs/divergence.md"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


Out = pytest.CaptureFixture[str]


def trace(name: str, *more: str) -> None:
    assert main(["trace", "--backend", "reference", "--tokens", TOKENS, "-o", name, *more]) == 0


def test_the_worked_example(home: Path, capsys: Out) -> None:
    """Every command of docs/divergence.md, and every line that it shows."""
    shown = 0
    for block in re.findall(r"```console\n(.*?)```", DOCUMENT.read_text("utf-8"), re.DOTALL):
        for part in block.split("$ ")[1:]:
            command, *lines = part.rstrip("\n").split("\n")
            argv = [
                a[1:].replace("\\n", "\n") if a.startswith("$") else a for a in shlex.split(command)
            ]
            assert argv[0] == "isobit"
            code = main(argv[1:])
            out = " ".join(capsys.readouterr().out.split())
            assert code == (1 if lines and "faulty" in part else 0), command
            for line in lines:
                assert " ".join(line.split()) in out, f"{command}: {line}"
                shown += 1
    assert shown > 15
    assert (home / "diff.html").stat().st_size > 50_000


def test_trace_diff_json(home: Path, capsys: Out) -> None:
    trace("a", "--stages", "attn_norm,moe_router_indices", "--layers", "2..3")
    trace("b", "--stages", "attn_norm,moe_router_indices", "--layers", "2..3", "--planes", "1")
    capsys.readouterr()
    assert main(["diff", "b", "a", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [(s["stage"], s["layer"]) for s in found["stages"]] == [
        ("attn_norm", 2),
        ("moe_router_indices", 2),
        ("attn_norm", 3),
        ("moe_router_indices", 3),
    ]
    assert found["first"] == {"stage": "attn_norm", "layer": 2}
    assert found["notes"] == ["activation_planes: A has 1, B has 2"]
    assert main(["diff", "a", "a"]) == 0
    assert "identical: 4 stages" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "code", "complaint"),
    [
        (["trace", "--tokens", "1,2", "-o", "t", "--stages", "foo"], 2, "'foo'"),
        (["trace", "--tokens", "1,2", "-o", "t", "--layers", "7..8"], 2, "within 0..7"),
        (["trace", "--tokens", "9999", "-o", "t"], 2, "got 9999"),
        (["trace", "--tokens", "1,2", "-o", "no/such/place"], 2, "cannot write"),
        (["trace", "--tokens", "1,2"], 2, "-o/--output"),
        (["verify", "--tokens", "5"], 5, "at least 2 to compare, got 1"),
        (["verify", "--tokens", "5,6", "--against", "abacus"], 2, "abacus"),
        (["verify", "--tokens", "5,6", "--against", "auto"], 2, "got 'auto'"),
        (["verify", "--tokens", "5,6", "--layers", "9"], 2, "within 0..7"),
        (["verify", "--tokens", "5,6", "--against", "oracle", "--against-planes", "1"], 2, "none"),
        (["verify", "--tokens", "5,6", "--against", "cpu", "--against-planes", "3"], 2, "1 or 2"),
        (["verify", "--tokens", "5,99999"], 2, "99999"),
        (["ablate", "--tokens", "5,6"], 2, "got neither"),
        (["ablate", "--tokens", "5,6", "--stage", "qkv_matmul=int4"], 2, "got 'int4'"),
        (["ablate", "--tokens", "5,6", "--stage", "qkv=f64"], 2, "got 'qkv'"),
        (["ablate", "--tokens", "5", "--rank"], 5, "at least 2"),
        (["ablate", "--tokens", "5,6", "--rank", "f8"], 2, "got 'f8'"),
    ],
)
def test_mistakes(argv: list[str], code: int, complaint: str, home: Path, capsys: Out) -> None:
    if argv[0] != "ablate":
        argv = [*argv, "--backend", "reference"]
    assert main(argv) == code
    err = capsys.readouterr().err
    assert complaint in err
    assert err.startswith("isobit: error: ")
    assert err.count("\n") == 1


def test_files_that_are_not_what_they_should_be(home: Path, capsys: Out) -> None:
    trace("a")
    Path("text").write_text("hello")
    for argv in (
        ["diff", "a", "text"],
        ["diff", "a", "absent"],
        ["diff", "a", "a", "--replay", "text"],
        ["replay", "text", "--backend", "reference"],
        ["replay", "absent", "--backend", "reference"],
        ["import-trace", "absent", "--tokens", "1,2", "-o", "t"],
    ):
        capsys.readouterr()
        assert main(argv) == 3, argv
        assert capsys.readouterr().err.count("\n") == 1


def test_traces_of_other_tokens_do_not_compare(home: Path, capsys: Out) -> None:
    trace("a")
    trace("b", "--stages", "attn_norm")
    assert main(["diff", "a", "b"]) == 5
    assert "missing in B" in capsys.readouterr().err
    assert main(["diff", "a", "b", "--stages", "attn_norm"]) == 0
    assert main(["trace", "--backend", "reference", "--tokens", "1,2", "-o", "c"]) == 0
    assert main(["diff", "a", "c"]) == 5


def test_a_place_that_cannot_be_written_is_refused_before_the_run(
    home: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools, "text_tokens", lambda *_: pytest.fail("the run began"))
    Path("folder").mkdir()
    for place in ("absent/t", "folder"):
        for argv in ("trace -o", "verify --html", "run --receipt", "run --routes"):
            capsys.readouterr()
            assert main([*argv.split(), place, "-p", "def"]) == 2, argv
            err = capsys.readouterr().err
            assert "cannot write" in err
            assert err.count("\n") == 1


def test_files_have_the_usual_permissions_and_replace_no_device(home: Path, capsys: Out) -> None:
    Path("plain").touch()
    trace("t")
    run = ["run", "--backend", "cpu", "--tokens", TOKENS, "-n", "1", "--routes"]
    assert main([*run, "routes"]) == 0
    assert {Path(n).stat().st_mode for n in ("t", "routes")} == {Path("plain").stat().st_mode}
    os.mkfifo("pipe")
    argv = ["trace", "--backend", "reference", "--tokens", TOKENS, "-o", "pipe"]
    assert main(argv) == 2
    assert "expected a file, got something else" in capsys.readouterr().err
    assert Path("pipe").is_fifo()


def test_a_trace_of_nothing_is_an_error(home: Path, capsys: Out) -> None:
    argv = ["trace", "--backend", "cpu", "--tokens", TOKENS, "-o", "t", "--stages"]
    for stages in ("attn_scores", "attn_norm,attn_softmax"):
        assert main([*argv, stages]) == 5
        assert "of layer 0: expected values of" in capsys.readouterr().err
    assert not Path("t").exists()
    assert main([*argv, "all"]) == 0
    assert "not held by cpu: attn_scores, attn_softmax" in capsys.readouterr().err


def test_comparisons_run_where_there_is_no_gpu(home: Path, capsys: Out) -> None:
    """Without --backend: what the README's table of commands shows."""
    Path("text").write_text("def read(path):\n    return path\n")
    assert main(["verify", "--tokens", TOKENS]) == 0
    assert main(["accuracy", "--text", "text", "--planes", "2"]) == 0
    assert main(["run", "--tokens", TOKENS, "-n", "2", "--receipt", "r"]) == 0
    assert main(["replay", "r"]) == 0
    assert "identical: 2 tokens on cpu" in capsys.readouterr().out


def test_a_backend_that_falls_back_is_an_error(
    capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isobit.backends.cuda.available", lambda: (False, "no such device"))
    monkeypatch.setattr("isobit.backends.wgpu.available", lambda **_: (False, "nor one"))
    assert main(["verify", "--tokens", "5,6", "--backend", "auto"]) == 5
    error = capsys.readouterr().err
    assert "using cpu (no such device; nor one); name the backend that is meant" in error


def test_verify_the_cpu(capsys: Out, home: Path) -> None:
    assert main(["verify", "--backend", "cpu", "--tokens", TOKENS, "--html", "v.html"]) == 0
    assert "identical: 139 stages" in capsys.readouterr().out
    assert "const D = {" in Path("v.html").read_text("utf-8")
    assert main(["verify", "--backend", "cpu", "--tokens", TOKENS, "--against", "oracle"]) == 0
    out = capsys.readouterr().out
    assert "identical" not in out
    assert out.startswith("accuracy of cpu against oracle")


def test_accuracy(home: Path, capsys: Out) -> None:
    Path("text").write_text("def read(path):\n    with open(path) as f:\n        return f.read()\n")
    argv = ["accuracy", "--backend", "cpu", "--text", "text", "--window", "8"]
    assert main([*argv, "--json"]) == 0
    fine, rough = json.loads(capsys.readouterr().out)
    assert (fine["activation_planes"], rough["activation_planes"]) == (2, 1)
    assert fine["mean_kl"] < 1e-4 < rough["mean_kl"]
    assert main([*argv, "--planes", "1"]) == 0
    assert "cpu, planes 1" in capsys.readouterr().out
    Path("text").write_text("x")
    assert main(argv) == 5


def test_receipt_across_backends(home: Path, capsys: Out) -> None:
    settings = ["-n", "6", "--temperature", "0.7", "--seed", "3", "--receipt", "r", "--routes", "e"]
    assert main(["run", "--backend", "cpu", "--tokens", TOKENS, *settings]) == 0
    assert Path("e").stat().st_size > 8 * 4 * 4 * 11
    capsys.readouterr()
    assert main(["replay", "r", "--backend", "reference"]) == 0
    assert capsys.readouterr().out.startswith("identical: 6 tokens on reference")
    receipt = json.loads(Path("r").read_text())
    receipt["tokens"][2]["experts"][5] = "0" * 12
    Path("r").write_text(json.dumps(receipt))
    assert main(["replay", "r", "--backend", "reference"]) == 1
    assert "generated token 2: moe_router_indices of layer 5" in capsys.readouterr().err
