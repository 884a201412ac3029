"""The comparing commands as people call them, in process, on the sample model."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from isobit.backends.cpu import CpuBackend
from isobit.backends.reference import ReferenceBackend
from isobit.cli import main, tools
from isobit.config import EngineConfig
from isobit.model.weights import Weights
from isobit.verify.faults import ChangedStage, Planted, plant
from isobit.verify.trace_file import Manifest, Trace
from tests.helpers.page import run_page

OP = ["--op", "attn_norm=os.path:join"]
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
    assert run_page(DOCUMENT, capsys) > 30
    assert (home / "diff.html").stat().st_size > 50_000


def test_trace_diff_json(home: Path, capsys: Out) -> None:
    trace("a", "--stages", "attn_norm,moe_router_indices", "--layers", "2..3")
    trace(
        "b",
        "--stages",
        "attn_norm,moe_router_indices",
        "--layers",
        "2..3",
        "--activation-bits",
        "8",
    )
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
    assert found["notes"] == ["activation_bits: A has 8, B has 16"]
    shutil.copy("a", "again")
    assert main(["diff", "a", "again"]) == 0
    assert "identical: 4 stages" in capsys.readouterr().out
    Path("link").symlink_to("a")
    for same in ("a", "link"):
        assert main(["diff", "a", same]) == 5
        assert "got a twice: it equals itself" in capsys.readouterr().err
    assert main(["diff", "a", "again", "--layers", "1..2"]) == 5
    assert "layer 1: expected in both traces, found in none" in capsys.readouterr().err


def test_a_gate_and_an_accuracy_are_of_finite_values(
    home: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was NaN had no part in their figures, and logits have none in the gate's."""

    def poison(logits: np.ndarray) -> None:
        logits[0, 7] = np.nan

    class Broken(ChangedStage):
        name = "cpu"

        def __init__(self, weights: Weights, engine: EngineConfig) -> None:
            super().__init__(weights, engine, "lm_head", None, poison)

    several = prompts("[605, 290]", "[17, 5]")
    monkeypatch.setattr("isobit.backends.cpu.CpuBackend", Broken)
    for against in (["--against", "oracle"], ["--min-cosine", "0.9"]):
        for tokens in (["--tokens", "605,290"], several):
            assert main(["verify", *tokens, *against]) == 1
            assert "lm_head: 1 values are NaN or infinite in A alone" in capsys.readouterr().err


def test_what_a_trace_says_of_itself_does_nothing_to_a_terminal(home: Path, capsys: Out) -> None:
    about = {"tokens": [1, 2], "positions": [0, 1], "backend": "\x1b[2J", "device": "\x9b1m"}
    for name, x in (("a", 1), ("b", 2)):
        stage = "lm_head\x1b]0;x"
        one = Manifest(**about, stages=[stage], isobit=f"\x07{name}")
        Trace(one, {stage: np.full((2, 3), x, np.float32)}).save(name)
    for more in ([], ["--every"], ["--format", "md"], ["--format", "table"]):
        assert main(["diff", "a", "b", *more]) == 1
        said = capsys.readouterr()
        assert "lm_head\\x1b]0;x" in said.out
        assert not {"\x1b", "\x9b", "\x07"} & {*said.out, *said.err}


@pytest.mark.parametrize("fault", ["swapped-kv", "swapped-layers@6"])
def test_anyone_can_see_a_planted_fault_found(fault: str, capsys: Out) -> None:
    assert main(["verify", "--plant", fault, "--tokens", TOKENS, "--json"]) == 1
    out, err = capsys.readouterr()
    name, _, layer = fault.partition("@")
    place = plant(name, int(layer or 4), np.random.default_rng(0)).place
    first = json.loads(out)["first"]
    assert (first["stage"], first["layer"]) == place
    assert f"planted {name}: it first shows in {place[0]} of layer {place[1]}" in err
    assert "found there" in err


def test_a_fault_is_not_planted_where_the_other_side_shows_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    monkeypatch.setattr(CpuBackend, "fused_away", frozenset({("attn_norm", 4)}))
    asked = ["verify", "--against", "cpu", "--tokens", TOKENS, "--plant"]
    assert main([*asked, "one-ulp-norm@4"]) == 2
    assert "got one-ulp-norm, which is in attn_norm of layer 4" in capsys.readouterr().err
    assert main([*asked, "one-ulp-norm@3"]) == 1
    assert "found there" in capsys.readouterr().err


def test_a_planted_fault_that_does_not_show_is_an_error(
    capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    def harmless(name: str, layer: int, rng: np.random.Generator) -> Planted:
        return Planted(name, ("attention", layer), ReferenceBackend)

    monkeypatch.setattr("isobit.cli.verify.plant", harmless)
    assert main(["verify", "--plant", "swapped-kv", "--tokens", TOKENS]) == 1
    assert (
        "expected swapped-kv found at attention of layer 4, got nothing" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("argv", "code", "complaint"),
    [
        (["trace", "--tokens", "1,2", "-o", "t", "--stages", "foo"], 2, "'foo'"),
        (
            ["verify", "--tokens", "1,2", "--plant", "oops"],
            2,
            "no such fault: 'oops'; there are one-ulp-norm",
        ),
        (["verify", "--tokens", "1,2", "--plant", "ropepairs"], 2, "did you mean 'rope-pairs'?"),
        (["verify", "--tokens", "1,2", "--against", "refrence"], 2, "did you mean 'reference'?"),
        (["verify", "--tokens", "1,2", "--plant", "nan@8"], 2, "a layer from 0 to 7"),
        (["trace", "--tokens", "1,2", "-o", "t", "--layers", "7..8"], 2, "within 0..7"),
        (["trace", "--tokens", "9999", "-o", "t"], 2, "got 9999"),
        (["trace", "--tokens", "1,2", "-o", "no/such/place"], 2, "cannot write"),
        (["trace", "--tokens", "1,2"], 2, "-o/--output"),
        (["verify", "--tokens", "5", "-p", "x"], 2, "not allowed with"),
        (["verify"], 2, "expected one of -p, --prompt-file, --tokens, --prompts; got none"),
        (["verify", "--tokens", "5", "--prompts", "x"], 2, "got several"),
        (["verify", "--prompts", "absent"], 2, "no such file: 'absent'"),
        (["verify", "--tokens", "5", "--min-cosine", "1.5"], 2, "expected a cosine"),
        (["verify", "--tokens", "5,6", "--against", "abacus"], 2, "abacus"),
        (["verify", "--tokens", "5,6", "--against", "auto"], 2, "got 'auto'"),
        (["verify", "--tokens", "5,6", "--layers", "9"], 2, "within 0..7"),
        (
            ["verify", "--tokens", "5,6", "--against", "oracle", "--against-activation-bits", "8"],
            2,
            "none",
        ),
        (
            ["verify", "--tokens", "5,6", "--against", "cpu", "--against-activation-bits", "24"],
            2,
            "8 or 16",
        ),
        (["verify", "--tokens", "5,99999", "--against", "cpu"], 2, "99999"),
        (["verify", "--tokens", "5,6"], 5, "got reference with 16 bits twice"),
        (
            ["verify", "--tokens", "5", "--plant", "nan", "--against", "oracle"],
            2,
            "to compare with",
        ),
        (["verify", "--tokens", "5,6", *OP, *OP], 2, "each stage once, got one twice"),
        (["verify", "--tokens", "5,6", *OP, "--plant", "nan"], 2, "expected no --plant"),
        (["ablate", "--tokens", "5,6"], 2, "got neither"),
        (["ablate", "--tokens", "5,6", "--stage", "qkv_matmul=int4"], 2, "got 'int4'"),
        (["ablate", "--tokens", "5,6", "--stage", "qkv=f64"], 2, "did you mean 'qkv_matmul'"),
        (["ablate", "-p", "", "--rank"], 2, "got none"),
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
    shutil.copy("a", "b")
    Path("text").write_text("hello")
    for argv in (
        ["diff", "a", "text"],
        ["diff", "a", "absent"],
        ["diff", "a", "b", "--replay", "text"],
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
    assert "expected a file, got a named pipe" in capsys.readouterr().err
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
    assert main(["accuracy", "--text", "text", "--activation-bits", "16"]) == 0
    assert main(["run", "--tokens", TOKENS, "-n", "2", "--receipt", "r"]) == 0
    assert main(["replay", "r"]) == 0
    assert "identical: 2 tokens on cpu" in capsys.readouterr().out


def test_a_backend_that_falls_back_is_an_error(
    capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isobit.backends.may_have_gpu", lambda: True)
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
    assert (fine["activation_bits"], rough["activation_bits"]) == (16, 8)
    assert fine["mean_kl"] < 1e-4 < rough["mean_kl"]
    assert main([*argv, "--activation-bits", "8"]) == 0
    assert "cpu, 8 bits" in capsys.readouterr().out
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


def prompts(*lines: str) -> list[str]:
    Path("prompts").write_text("\n".join(lines))
    return ["--prompts", "prompts"]


INT8 = [
    "--backend",
    "cpu",
    "--activation-bits",
    "8",
    "--against",
    "cpu",
    "--against-activation-bits",
    "16",
]


def test_several_prompts_in_one_table(home: Path, capsys: Out) -> None:
    """What the page of documentation does not show of it."""
    several = prompts("[605, 290]", "", "[17]", '"\\n"', "import")
    assert main(["verify", "--backend", "cpu", *several]) == 0
    out = capsys.readouterr().out
    assert len([line for line in out.splitlines() if line.startswith("|")]) == 2 + 4
    assert "prompt 1: one token: attention is trivial" in out
    assert main(["verify", *INT8, *several, "--json"]) == 1
    shown = capsys.readouterr()
    assert "the runs differ for 4 of 4 prompts: 0, 1, 2, 3" in shown.err
    assert len(json.loads(shown.out)["prompts"]) == 4
    assert main(["verify", *INT8, *several, "--html", "x.html"]) == 2
    assert (
        main(["ablate", "--activation-bits", "8", *several, "--stage", "lm_head=f64", "--json"])
        == 0
    )
    for outcome in json.loads(capsys.readouterr().out):
        assert len(outcome["shares"]) == 4
        assert outcome["uncertainty"] >= 0


def test_a_ranking_beside_a_guess(capsys: Out) -> None:
    argv = ["ablate", "--activation-bits", "8", "--tokens", "605", "--layers", "0..0"]
    argv += ["--stage", "lm_head=f64", "--rank"]
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [o["name"] for o in found[:3]] == [
        "specification",
        "lm_head=f64",
        "specification, experts pinned",
    ]
    assert {o["name"] for o in found if o.get("fit")} >= {o["name"] for o in found[3:9]}
    assert [o["share"] > 1e-6 for o in found[2:]] == [True] * 7 + [False] * 15
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert out.index("share gone") < out.index("| stage alone") < out.index("fits: activations")


@pytest.mark.parametrize("line", ["[1, 2", "[]", "[1.5]", "[true]", '""', '"a" b', "[" * 9999])
def test_a_line_that_is_no_prompt(line: str, home: Path, capsys: Out) -> None:
    assert main(["verify", "--backend", "cpu", *prompts("[5]", line)]) == 2
    assert "prompts:2: expected text" in capsys.readouterr().err


def test_a_gate_on_the_cosine_of_layers(home: Path, capsys: Out) -> None:
    argv = ["verify", *INT8, "--tokens", TOKENS, "--min-cosine", "1", "--json"]
    assert main(argv) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["gate"]["below"] == list(range(8))
    assert "gate: cosine ≥ 1 at 0 of 8 layers; below: layer 0 at 0.999" in shown.err
    trace("a", "--activation-bits", "8")
    trace("b")
    assert main(["diff", "a", "b", "--min-cosine", "0.99"]) == 0
    assert main(["diff", "a", "b", "--min-cosine", "1"]) == 1
    assert main(["diff", "a", "b", "--min-cosine", "0.9", "--stages", "attn_norm"]) == 5
    assert "expected post_ffn_residual" in capsys.readouterr().err


def test_a_flip_is_shown_without_texts_where_no_model_is_at_hand(home: Path, capsys: Out) -> None:
    argv = ["trace", "--backend", "cpu", "-p", "def fibonacci(n): return 42\n", "-o"]
    assert main([*argv, "b"]) == 0
    assert main([*argv, "a", "--activation-bits", "8"]) == 0
    assert main(["diff", "a", "b"]) == 1
    assert "after position 12 A goes on with 261, B with 265" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("planes", "against"),
    [(2, ["cpu", "--against-activation-bits", "8"]), (2, ["oracle"]), (1, ["oracle"])],
)
def test_the_arithmetic_that_fits_is_named(
    planes: int, against: list[str], home: Path, capsys: Out
) -> None:
    argv = [
        "verify",
        "--backend",
        "cpu",
        "--activation-bits",
        str(8 * planes),
        "--against",
        *against,
    ]
    main([*argv, "--tokens", TOKENS])
    out = capsys.readouterr().out
    [line] = [x for x in out.splitlines() if "activations are" in x]
    words = ("int8", "int16 in two planes")[planes - 1]
    assert f"A's activations are {words} in blocks of 256 in qkv_matmul, attn_out, moe_" in line
    assert "lm_head" in line
    assert not {"attn_norm", "swiglu", "softmax"} & set(line.replace(",", "").split())
