"""Traces of other engines in APRT folders: read, refused, compared and replayed."""

import json
import re
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import isobit
from isobit.cli import main
from isobit.errors import FileRefused, UsageError
from isobit.verify.aprt import read_folder
from isobit.verify.arithmetic import Array
from isobit.verify.compare import compare
from isobit.verify.forward import Run, forward
from isobit.verify.other_arithmetics import ReversedArithmetic, rounding
from isobit.verify.report import summary
from isobit.verify.trace import record
from isobit.verify.trace_file import Manifest, Trace
from isobit.verify.verify import open_replay

IDS = [1138, 550, 1754, 65, 404, 565, 14, 411, 5436, 223, 19, 18]


@pytest.fixture(scope="module")
def recorded() -> Trace:
    with isobit.load("sample", "reference") as model:
        return record(model, IDS)


def write_folder(root: Path, trace: Trace, rows: slice = slice(None)) -> None:
    for stage, layer in trace.stages():
        home = root if layer is None else root / f"layer-{layer}"
        home.mkdir(parents=True, exist_ok=True)
        values = np.ascontiguousarray(trace[stage, layer][rows], "<f4")
        header = struct.pack("<4sII", b"APRT", 0xFFFFFFFF if layer is None else layer, values.size)
        (home / f"{stage}.bin").write_bytes(header + values.tobytes())


@pytest.mark.parametrize("last", [False, True])
def test_a_folder_comes_back_identical(last: bool, recorded: Trace, tmp_path: Path) -> None:
    write_folder(tmp_path / "in", recorded, slice(-1, None) if last else slice(None))
    imported = read_folder(tmp_path / "in", IDS, last=last, engine="other")
    imported.save(tmp_path / "t")
    diff = compare(Trace.load(tmp_path / "t"), recorded)
    assert diff.identical
    assert len(diff.stages) == len(recorded.stages())
    tokens = 1 if last else len(IDS)
    assert all(s.shape == (tokens, *recorded[s.stage, s.layer].shape[1:]) for s in diff.stages)
    assert diff.a.backend == "other"
    assert diff.router_rows == 8 * (1 if last else len(IDS))
    assert imported.margin(3) is not None


def test_a_folder_as_aprender_writes_it(recorded: Trace, tmp_path: Path) -> None:
    """The embedding in layer 0, and stages that this graph does not have."""
    write_folder(tmp_path, recorded)
    overwrite(tmp_path / "embedding.bin", 4, bytes(4))
    (tmp_path / "embedding.bin").rename(tmp_path / "layer-0/embedding.bin")
    for other in ("qkv_bias", "ffn_silu"):
        shutil.copy(tmp_path / "layer-3/qkv_matmul.bin", tmp_path / f"layer-3/{other}.bin")
    notes: list[str] = []
    imported = read_folder(tmp_path, IDS, note=notes.append)
    assert compare(imported, recorded).identical
    assert imported.stages() == recorded.stages()
    assert notes == [f"{tmp_path}: left out ffn_silu and qkv_bias, which the model has not"]
    shutil.copy(tmp_path / "layer-0/embedding.bin", tmp_path / "embedding.bin")
    with pytest.raises(FileRefused, match="expected embedding once"):
        read_folder(tmp_path, IDS)


def test_a_dense_folder_as_aprender_spells_it(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32)
    (tmp_path / "layer-0").mkdir()
    header = struct.pack("<4sII", b"APRT", 0, 12)
    (tmp_path / "layer-0/ffn_swigl.bin").write_bytes(header + values.tobytes())
    value = read_folder(tmp_path, [1, 2, 3])["ffn_swiglu", 0]
    np.testing.assert_array_equal(value, values.reshape(3, 4))


@pytest.mark.parametrize("last", [False, True])
def test_two_folders_are_replayed(last: bool, recorded: Trace, tmp_path: Path) -> None:
    """Shapes come from the model; of the last token alone, attention lacks the other keys."""
    rows = slice(-1, None) if last else slice(None)
    sides = []
    with isobit.load("sample", "reference", activation_bits=8) as coarse:
        both = (record(coarse, IDS), recorded)
    for name, trace in zip("ab", both, strict=True):
        write_folder(tmp_path / name, trace, rows)
        sides.append(read_folder(tmp_path / name, IDS, last=last))
    diff = compare(*sides, replay=open_replay("sample", sides[1].manifest))
    own = {
        (s.stage, s.layer): s.own_error.relative_rms if s.own_error else None for s in diff.stages
    }
    assert own["attn_norm", 3] < 1e-6
    assert own["moe_expert_out", 3] > 1e-3
    assert (own["attention", 3] is None) == last
    exact = compare(sides[0], recorded, replay=open_replay("sample", recorded.manifest))
    origins = {(s.stage, s.layer): s.origin for s in exact.stages}
    assert origins["moe_expert_out", 3] == "faulty"
    assert origins["attention", 3] == ("not replayed" if last else "propagated")
    assert ("replay: 16 stages lack the inputs" in "\n".join(summary(exact))) == last


def test_a_trace_of_another_model_is_not_replayed(
    small_model: Path, recorded: Trace, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="tokens: expected ids from 0 to 319"):
        open_replay(str(small_model), Manifest([500, 1], [0, 1], "other"))
    with pytest.raises(FileRefused, match="a trace of numerics version 1, got 2"):
        open_replay(str(small_model), Manifest([1, 1], [0, 1], "other", numerics=2))
    write_folder(tmp_path, recorded)
    trace = read_folder(tmp_path, [1] * len(IDS))
    for stage, complaint in (
        ("qkv_matmul", r"qkv_matmul of layer 0: expected shape \(512,\) for each token, got"),
        ("attn_norm", "attn_norm of layer 2: expected a stage of the model's 2 layers"),
    ):
        replay = open_replay(str(small_model), trace.manifest)
        with pytest.raises(FileRefused, match=complaint):
            compare(trace, trace, frozenset({stage}), replay=replay)


def overwrite(path: Path, at: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[at : at + len(data)] = data
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda r: overwrite(r / "layer-1/attn_norm.bin", 0, b"APRX"), "more, got b'APRX"),
        (lambda r: overwrite(r / "layer-1/attn_norm.bin", 4, b"\2"), "layer 1, the file says 2"),
        (lambda r: overwrite(r / "layer-1/attn_norm.bin", 8, b"\xff" * 4), "expected 17179869192"),
        (lambda r: (r / "layer-1/attn_norm.bin").write_bytes(b""), "8 bytes more, got b''"),
        (lambda r: (r / "layer-1/attn_norm.bin").write_bytes(b"APRT"), "more, got b'APRT'"),
        (
            lambda r: ((r / "lm_head.bin").unlink(), (r / "lm_head.bin").symlink_to("/dev/zero")),
            "lm_head.bin: expected a file, got something else",
        ),
        (lambda r: (r / "lm_head.bin").write_bytes(b"APRT" + b"\xff" * 4 + bytes(4)), "multiple"),
        (lambda r: (r / "lm_head.bin").rename(r / "logits.bin"), "got 'logits'"),
        (lambda r: (r / "lm_head.bin").rename(r / "layer-1/lm_head.bin"), "the folder itself"),
        (lambda r: (r / "embedding.bin").rename(r / "layer-1/embedding.bin"), "the folder itself"),
        (lambda r: overwrite(r / "lm_head.bin", 4, b"\2"), "layer 4294967295, the file says"),
        (lambda r: (r / "layer-1").rename(r / "layer-x"), "a folder layer-<n>"),
        (
            lambda r: overwrite(r / "layer-0/moe_router_indices.bin", 12, struct.pack("<f", 0.5)),
            "expert numbers",
        ),
        (
            lambda r: overwrite(r / "layer-0/moe_router_indices.bin", 12, struct.pack("<f", 1e30)),
            "expert numbers",
        ),
    ],
)
def test_damaged_folders_are_refused(
    damage: Callable[[Path], object], complaint: str, recorded: Trace, tmp_path: Path
) -> None:
    write_folder(tmp_path, recorded)
    damage(tmp_path)
    with pytest.raises(FileRefused, match=re.escape(complaint)):
        read_folder(tmp_path, IDS)


def test_folders_that_are_none(tmp_path: Path, recorded: Trace) -> None:
    with pytest.raises(UsageError, match="found none"):
        read_folder(tmp_path, IDS)
    with pytest.raises(FileRefused, match="expected a folder"):
        read_folder(tmp_path / "absent", IDS)
    write_folder(tmp_path, recorded)
    with pytest.raises(FileRefused, match=r"multiple of 7 values"):
        read_folder(tmp_path, IDS[:7])


def test_a_folder_is_held_against_the_model(
    recorded: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Of 12 tokens, said to be of the last alone, every row is 12 times as wide as it can be."""
    monkeypatch.chdir(tmp_path)
    write_folder(Path("all"), recorded)
    argv = ["import-trace", "all", "--tokens", ",".join(map(str, IDS)), "-o", "t"]
    assert main([*argv, "--last"]) == 3
    err = capsys.readouterr().err
    assert "all/embedding.bin: embedding: expected shape (256,) for each token, got (3072,)" in err
    assert "of the last token alone" in err
    assert not Path("t").exists()
    assert main(argv) == 0
    assert Trace.load("t")["moe_expert_gate", 3].shape == recorded["moe_expert_gate", 3].shape
    assert main([*argv[:3], "1,999999", *argv[4:]]) == 2
    assert "tokens: expected ids from 0 to" in capsys.readouterr().err


def in_float32(odd: tuple[str, int | None] | None = None) -> dict[tuple[str, int | None], Array]:
    """What a float engine records: every operation in float32, sums in an order of its own, no
    fixed point; with the inputs of one stage rounded to bf16, if asked for."""
    floats, found = ReversedArithmetic(2), {}

    def compute(run: Run, stage: str, layer: int | None, inputs: Sequence[Array]) -> Array:
        if (stage, layer) == odd:
            rounded = rounding("bf16")
            assert rounded is not None
            inputs = [x if x.dtype.kind == "i" else rounded(x).astype(np.float32) for x in inputs]
        return run.compute(stage, layer, inputs, floats)

    with isobit.load("sample", "reference") as model:
        forward(
            Run(model.graph),
            np.array(IDS, np.int32),
            np.arange(len(IDS), dtype=np.int32),
            compute,
            lambda stage, layer, value: found.__setitem__((stage, layer), value),
        )
    return found


def import_and_diff(
    values: dict[tuple[str, int | None], Array], capsys: pytest.CaptureFixture[str]
) -> tuple[str, dict[str, Any]]:
    """As people do it: a folder, a trace of it, and one comparison that names no stage."""
    for (stage, layer), value in values.items():
        home = Path("floats") if layer is None else Path("floats") / f"layer-{layer}"
        home.mkdir(parents=True, exist_ok=True)
        header = struct.pack("<4sII", b"APRT", 0xFFFFFFFF if layer is None else layer, value.size)
        data = np.ascontiguousarray(value, "<f4").tobytes()
        (home / f"{stage}.bin").write_bytes(header + data)
    tokens = ["--tokens", ",".join(map(str, IDS))]
    assert main(["import-trace", "floats", *tokens, "--engine", "floats", "-o", "a"]) == 0
    assert main(["trace", "--backend", "reference", *tokens, "-o", "b"]) == 0
    capsys.readouterr()
    assert main(["diff", "a", "b", "--replay"]) == 1
    text = capsys.readouterr().out
    assert main(["diff", "a", "b", "--replay", "--json"]) == 1
    return text, json.loads(capsys.readouterr().out)


def test_a_float_engine_s_first_stage_beyond_rounding_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text, found = import_and_diff(in_float32(("attn_out", 5)), capsys)
    beyond = [(s["stage"], s["layer"]) for s in found["stages"] if s.get("beyond_float32")]
    assert beyond == [("attn_out", 5)]
    assert "first beyond float32 rounding: attn_out of layer 5" in text
    assert "bf16" in text
    assert found["not_compared"] == ["attn_scores", "attn_softmax"]  # which the engine never gave


def test_a_float_engine_in_float32_throughout_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text, found = import_and_diff(in_float32(), capsys)
    assert not [s for s in found["stages"] if s.get("beyond_float32")]
    assert "no operation is off by more than float32 rounding explains" in text
