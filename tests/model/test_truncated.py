"""A model file that becomes shorter while it is in use: said where it can be said."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import isobit
from isobit.errors import BackendUnavailable, ModelRefused
from isobit.runtime.loaded import LoadedModel
from isobit.runtime.model import Model, sample_path
from tests.helpers.expected import not_run

SCRIPT = """
import os, sys
import isobit
from isobit.backends.cpu._cpu import exit_on_bus_error
from isobit.runtime import loaded
loaded._LOOK = 1e9  # so that it is not seen in time
exit_on_bus_error()  # as every command does
with isobit.load(sys.argv[1], "cpu", context=64) as model:
    os.truncate(sys.argv[1], 1 << 20)
    model.logits([1, 2, 3])
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copy(sample_path(), tmp_path / "co\npy.gguf"))


@pytest.mark.parametrize("name", ["reference", "cpu", "wgpu"])
def test_it_is_refused_before_a_pass(
    name: str, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isobit.runtime.loaded._LOOK", 0.0)
    with loaded(name, copy) as model:
        before = model.logits([1, 2])
        size = copy.stat().st_size
        os.truncate(copy, size - 4096)
        with pytest.raises(ModelRefused, match=f"expected {size} bytes, as when it was opened"):
            model.logits([1, 2])
        copy.unlink()  # another file in its place is no harm: the map is of the first
        copy.write_bytes(b"")
        assert before.shape == (2, 8192)
        LoadedModel._check_file(model)


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
