"""Traces of other engines in APRT folders: read, refused, compared and replayed."""

import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import isobit
from isobit.errors import FileRefused, UsageError
from isobit.verify.aprt import read_folder
from isobit.verify.compare import compare
from isobit.verify.report import summary
from isobit.verify.trace import Manifest, Trace, record
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
    assert notes == [f"{tmp_path}: left out ffn_silu and qkv_bias, which Qwen3 has not"]
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
    with isobit.load("sample", "reference", activation_planes=1) as coarse:
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
