"""Models in several files: opened by any part, and refused where the parts do not fit together."""

import hashlib
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest

import isobit
from isobit.cli import main
from isobit.errors import ModelRefused, UsageError
from isobit.gguf.reader import GGUFFile
from tests.helpers.synth import Geometry, all_in, write_model

NAMES = [f"t{i}" for i in range(7)]


def write(path: Path, *, small_first: bool = False, per_part: int = 3) -> list[Path]:
    """Seven tensors in parts of three, by the ``gguf`` package."""
    writer = gguf.GGUFWriter(
        path, "test", split_max_tensors=per_part, small_first_shard=small_first
    )
    writer.add_string("a.text", "ü")
    for i, name in enumerate(NAMES):
        writer.add_tensor(name, np.full((2, i + 1), i, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(path.parent.glob(path.stem + "-*.gguf"))


def write_part(path: Path, split: dict[str, object], tensors: list[str]) -> None:
    """One part by hand; ``split`` is its metadata, a value of None leaves a key out."""
    writer = gguf.GGUFWriter(path, "test")
    for key, value in split.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif value is not None:
            writer.add_int32(key, value)  # type: ignore[arg-type]
    for name in tensors:
        writer.add_tensor(name, np.ones(3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def keys(number: object, count: object = 2, tensors: object = 2) -> dict[str, object]:
    return {"split.no": number, "split.count": count, "split.tensors.count": tensors}


@pytest.mark.parametrize("small_first", [False, True])
def test_any_part_opens_the_whole(tmp_path, small_first):
    paths = write(tmp_path / "m.gguf", small_first=small_first)
    assert len(paths) == (4 if small_first else 3)
    joined = hashlib.sha256(b"".join(p.read_bytes() for p in paths)).hexdigest()
    for path in paths:
        calls: list[tuple[int, int]] = []

        def step(done: int, total: int, calls: list[tuple[int, int]] = calls) -> None:
            calls.append((done, total))

        with GGUFFile.open(path) as file:
            assert file.path == paths[0]
            assert file.paths == tuple(paths)
            assert file.file_size == sum(p.stat().st_size for p in paths)
            assert file.metadata["a.text"] == "ü"
            assert list(file.tensors) == NAMES
            for i, name in enumerate(NAMES):
                values = file.data(name).view(np.float32)
                np.testing.assert_array_equal(values, np.full(2 * (i + 1), i, np.float32))
            assert file.sha256(step) == joined
        assert calls[-1] == (file.file_size, file.file_size)
        with pytest.raises(UsageError, match="closed"):
            file.data("t0")


def test_a_relative_name_and_a_link(tmp_path, monkeypatch):
    """As a cache of downloads has them: links with a model's names to files without."""
    paths = write(tmp_path / "m.gguf")
    (tmp_path / "links").mkdir()
    for n, path in enumerate(paths):
        path.rename(tmp_path / str(n))
        (tmp_path / "links" / path.name).symlink_to(tmp_path / str(n))
    monkeypatch.chdir(tmp_path / "links")
    assert list(GGUFFile.open(paths[2].name).tensors) == NAMES


def test_split_of_one_is_a_whole_file(tmp_path):
    """llama.cpp's tools leave the keys in when they merge parts, the count being 0."""
    for count in (0, 1):
        write_part(tmp_path / "m.gguf", keys(0, count, 5), ["a"])
        assert list(GGUFFile.open(tmp_path / "m.gguf").tensors) == ["a"]


def test_a_split_model_computes_what_the_whole_one_does(tmp_path, monkeypatch):
    geometry = Geometry(layers=1, head_dim=64, heads=2, kv_heads=1, ffn=32, experts=4)
    whole = write_model(tmp_path / "m.gguf", geometry, all_in("Q8_0"))

    class Splitting(gguf.GGUFWriter):
        def __init__(self, path, arch):
            super().__init__(path, arch, split_max_tensors=5)

    monkeypatch.setattr(gguf, "GGUFWriter", Splitting)
    write_model(tmp_path / "s.gguf", geometry, all_in("Q8_0"))
    parts = sorted(tmp_path.glob("s-*.gguf"))
    assert len(parts) == 3
    ids = [1, 2, 3, 4]
    with (
        isobit.load(whole, backend="reference") as one,
        isobit.load(parts[1], backend="reference") as two,
    ):
        assert one.logits(ids).tobytes() == two.logits(ids).tobytes()
        assert two.path == parts[0]


def test_inspect_shows_the_parts(tmp_path, capsys):
    paths = write(tmp_path / "m.gguf")
    assert main(["inspect", str(paths[1]), "--sha256"]) == 3  # a model of no architecture
    out = capsys.readouterr().out
    assert out.startswith(f"{paths[0]}: GGUF v3, 3 files, ")
    assert hashlib.sha256(b"".join(p.read_bytes() for p in paths)).hexdigest() in out


FIRST, SECOND = "m-00001-of-00002.gguf", "m-00002-of-00002.gguf"


@pytest.mark.parametrize(
    ("first", "second", "of", "expected", "got"),
    [
        (keys(0), None, SECOND, "one of the model's 2 parts, which belong in", "No such file"),
        (keys(0), keys(1, 3), SECOND, "split.count: expected 2", "got 3"),
        (keys(0), keys(0), SECOND, "split.no: expected 1", "got 0"),
        (keys(0), keys(1, 2, 3), SECOND, "split.tensors.count: expected 2", "got 3"),
        (keys(0), keys(None), SECOND, "'split.no': expected a number", "got none"),
        (keys(0), keys("1"), SECOND, "'split.no': expected a number", "got '1'"),
        (keys(0), keys(1, None), SECOND, "'split.count': expected a number", "got none"),
        (keys(0), keys(1) | {"a": 5}, SECOND, "'a': expected what m-00001", "got 5"),
        (keys(0, 2, 3), keys(1, 2, 3), FIRST, "count: expected the 2 tensors", "got 3"),
        (keys(0, 2, 1), keys(1, 2, 1), FIRST, "count: expected the 2 tensors", "got 1"),
        (keys(0, 2, None), keys(1, 2), FIRST, "'split.tensors.count': expected a", "got none"),
        (keys(2), keys(1), FIRST, "split.no: expected 0 to 1", "got 2"),
        (keys(-1), keys(1), FIRST, "'split.no': expected a number", "got -1"),
        (keys(0, "2"), keys(1), FIRST, "'split.count': expected a number", "got '2'"),
        (keys(True), keys(1), FIRST, "'split.no': expected a number", "got True"),
        (keys(0, 3), keys(1), FIRST, "ends in -00001-of-00003.gguf", "got 'm-00001-of-00002.gguf'"),
        (keys(1), keys(1), FIRST, "ends in -00002-of-00002.gguf", "got 'm-00001-of-00002.gguf'"),
        (keys(0, 70000), keys(1), FIRST, "ends in -00001-of-70000.gguf", "got 'm-00001"),
    ],
)
def test_parts_that_do_not_fit_are_refused(tmp_path, first, second, of, expected, got):
    write_part(tmp_path / FIRST, first, ["a"])
    if second is not None:
        write_part(tmp_path / SECOND, second, ["b"])
    with pytest.raises(ModelRefused) as caught:
        GGUFFile.open(tmp_path / FIRST)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / of}: ")
    assert expected in message
    assert got in message
    assert message.isprintable()


def test_a_tensor_in_two_parts_is_refused(tmp_path):
    write_part(tmp_path / FIRST, keys(0), ["a"])
    write_part(tmp_path / SECOND, keys(1), ["a"])
    for part in (FIRST, SECOND):
        with pytest.raises(ModelRefused, match=r"00002.gguf: tensor 'a': expected it in one part"):
            GGUFFile.open(tmp_path / part)


def test_a_damaged_part_is_named(tmp_path):
    paths = write(tmp_path / "m.gguf")
    paths[1].write_bytes(paths[1].read_bytes()[:-32])  # its last tensor and its padding
    with pytest.raises(ModelRefused, match=r"m-00002-of-00003.gguf: tensor 't5'"):
        GGUFFile.open(paths[0])
    paths[1].unlink()
    paths[1].mkdir()
    with pytest.raises(ModelRefused, match=r"m-00002-of-00003.gguf: file: expected a regular"):
        GGUFFile.open(paths[2])


def test_a_part_under_another_name_is_refused(tmp_path):
    paths = write(tmp_path / "m.gguf")
    for name in ("m.gguf", "m-00002-of-00003.gguf.part", "m-2-of-3.gguf"):
        shutil.copy(paths[1], tmp_path / name)
        with pytest.raises(ModelRefused, match="file name: expected one that ends in -00002-of-"):
            GGUFFile.open(tmp_path / name)


def test_types_that_are_not_implemented_are_listed_from_every_part(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "test", split_max_tensors=1)
    writer.add_tensor("a", np.ones(4, np.float32))
    writer.add_tensor("b", np.zeros(3, np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelRefused, match="type of tensor 'b'"):
        GGUFFile.open(tmp_path / FIRST)
    file = GGUFFile.open(tmp_path / SECOND, strict=False)
    assert list(file.tensors) == ["a"]
    assert list(file.refused) == ["b"]
