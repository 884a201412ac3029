"""Kept digests: one read for a file, and none that belongs to another."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from isobit.gguf import digests
from isobit.gguf.reader import GGUFFile
from isobit.runtime.loaded import sample_path


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "SMALLEST", 1)
    monkeypatch.setattr(digests, "_SETTLED", 0)
    path = tmp_path / "model.gguf"
    shutil.copy(sample_path(), path)
    return path


def kept() -> list[str]:
    return [p.name for p in digests.folder().iterdir()] if digests.folder().is_dir() else []


def read(path: Path) -> tuple[str, bool]:
    """The digest, and whether the file was read for it."""
    told: list[int] = []
    with GGUFFile.open(path) as file:
        digest = file.sha256(lambda *done: told.append(done[0]))
    return digest, bool(told)


def test_a_file_is_read_once(model: Path) -> None:
    true = hashlib.sha256(model.read_bytes()).hexdigest()
    assert read(model) == (true, True)
    assert read(model) == (true, False)
    moved = model.rename(model.with_name("other.gguf"))  # changes the inode's time
    assert read(moved)[0] == true


def test_a_changed_file_is_read_again_whatever_its_time_says(model: Path) -> None:
    before, stat = read(model), model.stat()
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    model.write_bytes(data)
    os.utime(model, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert model.stat().st_size == stat.st_size
    assert read(model) == (hashlib.sha256(data).hexdigest(), True)
    assert read(model)[0] != before[0]


def test_what_was_kept_is_checked_and_not_needed(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true, _ = read(model)
    [name] = kept()
    (digests.folder() / name).write_text("not a digest")
    assert read(model) == (true, True)
    shutil.rmtree(digests.folder().parent)
    digests.folder().parent.write_text("a file where a folder should be")
    assert read(model) == (true, True)


def test_small_and_fresh_files_are_not_kept(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_SETTLED", 60_000_000_000)
    read(model)
    assert not kept()
    monkeypatch.setattr(digests, "_SETTLED", 0)
    monkeypatch.setattr(digests, "SMALLEST", 1 << 40)
    read(model)
    assert not kept()
