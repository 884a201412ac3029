"""Former names of options, arguments and fields are accepted for a release."""

import argparse
import json
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import isobit
from isobit.cli import main
from isobit.config import EngineConfig, without_planes
from isobit.errors import FileRefused, UsageError
from isobit.verify.receipt_file import Receipt
from isobit.verify.trace_file import Manifest


def parsed(command: str, *argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    import_module(f"isobit.cli.{command}").add_arguments(parser)
    return parser.parse_args(argv)


@pytest.mark.parametrize("planes", [1, 2])
def test_options_that_said_planes(planes: int) -> None:
    n, bits = str(planes), 8 * planes
    for flag in ("--planes", "--activation-planes"):
        assert parsed("run", "-p", "x", flag, n).activation_bits == bits
    assert parsed("ablate", "--tokens", "1", "--planes", n).activation_bits == bits
    stage = ("--layers", "0:1", "--planes", n)
    assert parsed("stage", "m.gguf", *stage).activation_bits == bits
    against = parsed("verify", "-p", "x", "--against-planes", n)
    assert (against.against_activation_bits, against.activation_bits) == (bits, 16)
    text = ("--text", "t", "--planes", f"{n},2")
    assert parsed("accuracy", *text).activation_bits == [bits, 16]


def test_planes_out_of_range_are_refused_by_their_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "-p", "x", "--planes", "3"]) == 2
    assert "--planes" in (said := capsys.readouterr().err)
    assert "expected 1 or 2, got 3" in said


def test_the_library_takes_planes() -> None:
    engine = EngineConfig(activation_planes=1)  # type: ignore[call-arg]
    assert (engine.activation_bits, engine.planes, engine.activation_planes) == (8, 1, 1)
    assert replace(engine, context=64).activation_bits == 8
    assert replace(engine, activation_bits=16).planes == 2
    with pytest.raises(UsageError, match="activation_planes: expected 1 or 2, got 3"):
        EngineConfig(activation_planes=3)  # type: ignore[call-arg]
    with isobit.load("sample", "cpu", activation_planes=1, context=64) as model:
        assert model.engine.activation_bits == 8


@pytest.mark.parametrize(("bits", "planes"), [(16, 1), (8, 2)])
def test_both_names_must_say_the_same(bits: int, planes: int) -> None:
    said = f"expected {8 * planes}, as activation_planes={planes} means, got {bits}"
    both: dict[str, Any] = {"activation_bits": bits, "activation_planes": planes}
    for make in (EngineConfig, partial(isobit.load, "sample", "cpu")):
        with pytest.raises(UsageError, match=said):
            make(**both)
    same: dict[str, Any] = {"activation_bits": bits, "activation_planes": bits // 8}
    assert EngineConfig(**same).activation_bits == bits
    with pytest.raises(FileRefused, match=rf"r\.json: activation_bits: .* got {bits} and {planes}"):
        without_planes(both, "r.json")


def test_json_keeps_the_former_name(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["run", "--tokens", "1", "-n", "1", "--backend", "cpu", "--json", "-c", "8"]
    assert main([*argv, "--activation-bits", "8"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["activation_bits"], found["activation_planes"]) == (8, 1)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ({"activation_planes": 1}, {"activation_bits": 8}),
        ({"activation_planes": None}, {"activation_bits": None}),
        ({"activation_planes": "2"}, {"activation_bits": "2"}),
        ({"activation_bits": 16}, {"activation_bits": 16}),
        ({"activation_bits": 16, "activation_planes": 2}, {"activation_bits": 16}),
        ({"a": 1}, {"a": 1}),
    ],
)
def test_files_that_say_planes(said: dict[str, object], meant: dict[str, object]) -> None:
    assert without_planes(said, "r.json") == meant


def test_receipts_and_traces_are_written_with_both_names(tmp_path: Path) -> None:
    path = str(tmp_path / "r.json")
    argv = ["run", "--tokens", "1", "-n", "1", "--backend", "cpu", "-c", "8", "--receipt", path]
    assert main([*argv, "--activation-bits", "8"]) == 0
    both = json.loads(Path(path).read_text())
    assert (both["activation_bits"], both["activation_planes"]) == (8, 1)
    receipt = Receipt.load(path)
    for name in ("activation_bits", "activation_planes"):
        assert Receipt.of({n: x for n, x in both.items() if n != name}, path) == receipt
    with pytest.raises(FileRefused, match="expected 8 for each of the activation_planes"):
        Receipt.of(both | {"activation_planes": 2}, path)
    text = Manifest([1], [0], "cpu", activation_bits=8).to_json()
    assert json.loads(text)["activation_planes"] == 1
    assert Manifest.from_json(text, "t").activation_bits == 8
