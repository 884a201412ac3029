"""inspect on files made for the purpose: what a token costs, and what would be refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from isobit.backend_names import BACKENDS
from isobit.cli import main
from isobit.gguf.formats import FORMATS, Format
from isobit.inspect import inspect, verdict
from tests.helpers.synth import Geometry, all_in, write_model

G = Geometry(layers=1, heads=2, kv_heads=1, head_dim=128, experts=4, experts_used=2, ffn=32)
F32 = all_in("F32")
QKV = ("attn_q", "attn_k", "attn_v")
STRANGE = F32 | {"attn_q": "F64"}


@pytest.mark.parametrize("tied", [False, True])
def test_active_bytes_count_what_a_decode_step_reads(tmp_path: Path, tied: bool) -> None:
    geometry = replace(G, tied=tied)
    found = inspect(write_model(tmp_path / "m.gguf", geometry, F32))
    assert found.refused == []
    one_row, output = G.hidden, G.vocab * G.hidden
    attention = 2 * (256 * G.hidden) + 2 * (128 * G.hidden) + 2 * 128
    experts = 2 * 3 * G.ffn * G.hidden
    norms = 3 * G.hidden
    expected = one_row + output + attention + experts + norms + G.experts * G.hidden
    assert found.active_bytes_per_token == 4 * expected
    assert found.kv_bytes_per_token == 2 * (2 * 128 + 4)


def test_a_type_that_is_not_implemented_is_named(tmp_path: Path) -> None:
    found = inspect(write_model(tmp_path / "m.gguf", G, STRANGE))
    assert len(found.refused) == 1
    assert "blk.0.attn_q.weight" in found.refused[0]
    assert "F64" in found.refused[0]
    assert found.active_bytes_per_token is None
    assert found.types[-1].type == "F64"
    assert found.types[-1].nbytes is None


@pytest.mark.parametrize("name", ["blk.0.ffn_up_exps.weight", "token_embd.weight"])
def test_a_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    found = inspect(write_model(tmp_path / "m.gguf", G, F32, without=[name]))
    assert len(found.refused) == 1
    assert f"tensor {name}: expected in the file" in found.refused[0]


def test_an_unknown_scaling_is_named(tmp_path: Path) -> None:
    scaling = {"qwen3moe.rope.scaling.type": "longrope"}
    found = inspect(write_model(tmp_path / "m.gguf", G, F32, metadata=scaling))
    assert len(found.refused) == 1
    assert "rope.scaling.type" in found.refused[0]


def test_json_of_a_file_with_odd_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = {"test.nan": float("nan")}
    path = write_model(tmp_path / "m.gguf", G, STRANGE, metadata=odd)
    assert main(["inspect", str(path), "--json"]) == 3
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["metadata"]["test.nan"] == "nan"
    assert found["verdict"]["runs"] is False
    row = {"name": "blk.0.attn_q.weight", "type": "F64", "shape": [256, 256], "bytes": None}
    assert row in found["tensors"]
    assert main(["inspect", str(path), "--tensors"]) == 3
    out = capsys.readouterr().out
    assert "not implemented" in out
    assert "blk.0.attn_q.weight" in out
    assert out.endswith("runs here: no\n")


def test_a_type_is_refused_once_with_how_many_tensors_have_it(tmp_path: Path) -> None:
    geometry = replace(G, layers=5)
    path = write_model(tmp_path / "m.gguf", geometry, F32 | dict.fromkeys(QKV, "F64"))
    [line] = inspect(path).refused
    assert "its type and of 14 more, F64, is not implemented" in line


def test_the_verdict_counts_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_model(tmp_path / "m.gguf", G, F32)
    found = inspect(path)
    weights = sum(t.nbytes for t in found.types)
    cache = found.kv_bytes_per_token * found.config.context_length
    monkeypatch.setattr("isobit.backends.cuda.device.driver.available", lambda: (False, "none"))
    for memory, why, context in (
        (weights + cache, "on the CPU", found.config.context_length),
        (weights + cache - 1, "with --context ", found.config.context_length - 64),
        (weights, "slowly: its weights do not fit", 0),
    ):
        monkeypatch.setattr("isobit.inspect.total_memory", lambda n=memory: n)
        judged = verdict(found)
        assert judged.runs
        assert judged.why.startswith(why)
        assert (judged.needs, judged.there) == (weights + cache, memory)
        assert judged.context == context


def test_a_file_without_a_tokenizer_runs_from_token_ids(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_model(tmp_path / "m.gguf", G, F32, metadata={"tokenizer.ggml.model": "strange"})
    found = inspect(path)
    assert found.refused == []
    assert "tokenizer.ggml.model" in str(found.without_text)
    assert main(["inspect", str(path)]) == 0
    assert "no text, token ids alone: " in capsys.readouterr().out


@pytest.mark.parametrize("fmt", [f for f in FORMATS.values() if f.quantized], ids=lambda f: f.name)
def test_what_each_backend_has_kernels_for(
    fmt: Format, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All have them all."""
    path = write_model(tmp_path / "m.gguf", replace(G, ffn=256), all_in(fmt.name))
    found = inspect(path)
    assert found.refused == []
    assert list(found.backends) == list(BACKENDS)
    assert not any(found.backends.values())
    assert verdict(found).runs
    assert main(["inspect", str(path)]) == 0
    assert "\n- not " not in capsys.readouterr().out


def test_an_architecture_that_a_backend_lacks() -> None:
    found = inspect(Path(__file__).parents[1] / "data/pyhybrid-moe-34m-Q4_K_M.gguf")
    assert found.backends["reference"] is found.backends["cpu"] is found.backends["wgpu"] is None
