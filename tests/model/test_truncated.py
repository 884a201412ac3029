"""A model file that changes while it is in use: said where it can be said."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import isobit
from isobit.backends import open_backend
from isobit.backends.base import LOGITS, Backend, Batch
from isobit.backends.cpu import CpuBackend
from isobit.backends.distributed.parts import PartsBackend
from isobit.backends.distributed.pipeline import LocalStage
from isobit.config import EngineConfig
from isobit.errors import BackendUnavailable, ModelRefused
from isobit.gguf.reader import GGUFFile
from isobit.model.weights import Weights
from isobit.runtime.model import Model, sample_path
from tests.helpers.expected import not_run

SCRIPT = """
import os, sys
import isobit
from isobit.backends.cpu._cpu import exit_on_bus_error
from isobit.gguf.reader import GGUFFile
exit_on_bus_error()  # as every command does
with isobit.load(sys.argv[1], "cpu", context=64) as model:
    os.truncate(sys.argv[1], 1 << 20)
    GGUFFile.check_unchanged = lambda _: None  # as if it came in the midst of a pass
    model.logits([1, 2, 3])
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copy(sample_path(), tmp_path / "co\npy.gguf"))


@pytest.mark.parametrize("name", ["reference", "cpu", "wgpu"])
def test_it_is_refused_before_a_pass(
    name: str, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy.parent)
    with loaded(name, Path(copy.name)) as model:
        monkeypatch.chdir(tmp_path.parent)  # it is the same file from everywhere
        before = model.logits([1, 2])
        size = copy.stat().st_size
        os.truncate(copy, size - 4096)
        with pytest.raises(ModelRefused, match=f"expected {size} bytes, as when it was opened"):
            model.logits([1, 2])
        with pytest.raises(ModelRefused, match="as when it was opened"):
            model.generate([1, 2], max_tokens=2)
        copy.unlink()  # another file in its place is no harm: the map is of the first
        copy.write_bytes(b"")
        assert before.shape == (2, 8192)
        model.check_file()


def overwrite(path: Path) -> None:
    """The same size, another modification time, another inode never."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))  # whatever the clock of the system


def test_other_bytes_in_its_place_are_refused(copy: Path) -> None:
    recorder, changed = isobit.Recorder(), "the modification time that it had when it was opened"
    with loaded("cpu", copy) as model:
        model.generate([1, 2], max_tokens=2, watch=recorder)
        overwrite(copy)
        for use in (lambda: model.logits([1]), recorder.receipt, model.file.sha256):
            with pytest.raises(ModelRefused, match=changed):
                use()


def test_other_bytes_while_it_is_loaded_are_refused(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, closed = [], []

    def slow(*args: Any) -> Backend:
        overwrite(copy)
        made.append(open_backend(*args))
        monkeypatch.setattr(made[0], "close", lambda: closed.append(True))
        return made[0]

    monkeypatch.setattr("isobit.runtime.loaded.open_backend", slow)
    with pytest.raises(ModelRefused, match="load it again"):
        isobit.load(copy, "cpu", context=64)
    assert closed == [True]


def test_a_stage_of_a_pipeline_refuses_them_too(copy: Path) -> None:
    engine, one = EngineConfig(context=64), np.zeros(1, np.int32)
    with GGUFFile.open(copy) as file:
        weights = Weights.from_file(file)
        stage = LocalStage(CpuBackend, weights, engine, (0, weights.graph.n_layers))
        asked = Batch(one + 5, one, one, one[None], one), LOGITS, None
        assert stage.run(*asked)[0].logits is not None
        overwrite(copy)
        with pytest.raises(ModelRefused, match="load it again"):
            stage.run(*asked)
        stage.close()


def test_parts_open_the_same_file(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = PartsBackend._start

    def late(self: PartsBackend, *args: Any) -> None:
        (new := copy.with_name("new")).write_bytes(copy.read_bytes())
        new.replace(copy)
        start(self, *args)

    monkeypatch.setattr(PartsBackend, "_start", late)
    with pytest.raises(BackendUnavailable, match="another file than the first part has opened"):
        isobit.load(copy, "cpu", context=64, parts=2)


def test_a_file_that_is_replaced_or_linked_stays_what_it_was(copy: Path) -> None:
    with loaded("cpu", copy) as model:
        before = model.logits([1, 2])
        copy.with_name("link").hardlink_to(copy)
        (other := copy.with_name("other")).write_bytes(b"GGUF")
        other.replace(copy)
        assert (model.logits([1, 2]) == before).all()


def loaded(name: str, path: Path) -> Model:
    try:
        return isobit.load(path, name, context=64)
    except (BackendUnavailable, ImportError) as error:
        not_run(name, f"backend {name}: {error}")


def test_a_command_ends_with_one_line_that_names_it(copy: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(copy)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 3
    (line,) = ended.stderr.splitlines()[-1:]
    assert line.startswith("isobit: error: '")
    assert r"co\npy.gguf': expected the file to stay as it was opened" in line
    assert "Traceback" not in ended.stderr
