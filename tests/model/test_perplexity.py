"""Perplexity, by both definitions, against the plain formula over whole windows of logits."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

import isobit
from isobit.cli import main
from isobit.cli import perplexity as command
from isobit.errors import NothingCompared
from isobit.verify.accuracy import Accuracy
from isobit.verify.perplexity import Perplexity, perplexity
from tests.helpers.synth import write_model

TEXT = (Path(__file__).parents[1] / "data" / "heldout.txt").read_text()


@pytest.fixture(scope="module")
def model():
    with isobit.load("sample", "cpu") as opened:
        yield opened


def plain(model: isobit.Model, ids: list[int], window: int, first: int) -> list[float]:
    """Negative log likelihoods of the tokens after position ``first`` of each window."""
    found = []
    for start in range(0, len(ids), window):
        part = ids[start : start + window]
        x = model.logits(part).astype(np.float64)
        p = np.exp(x - x.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        found += [-np.log(p[i, part[i + 1]]) for i in range(first, len(part) - 1)]
    return found


@pytest.mark.parametrize(("second_half", "begin"), [(False, None), (True, None), (True, 2)])
def test_both_definitions(model: isobit.Model, second_half: bool, begin: int | None) -> None:
    ids = model.tokenize(TEXT)[:250]
    whole = ids[:200] if second_half else ids
    *_, found = perplexity(model, ids, 100, second_half=second_half, begin=begin)
    if begin is not None:
        whole = [begin if i % 100 == 0 else token for i, token in enumerate(whole)]
    expected = plain(model, whole, 100, 50 if second_half else 0)
    assert found.tokens == len(expected) == (98 if second_half else 247)
    assert found.value == pytest.approx(np.exp(np.mean(expected)), rel=1e-12)
    error = found.value * np.std(expected) / np.sqrt(len(expected) - 1)
    assert found.error == pytest.approx(error, rel=1e-9)


def test_windows_of_one_token_predict_nothing(model: isobit.Model) -> None:
    with pytest.raises(NothingCompared):
        list(perplexity(model, [1], 100))
    with pytest.raises(NothingCompared, match="at least 100"):
        list(perplexity(model, [1] * 99, 100, second_half=True))
    *_, found = perplexity(model, [1] * 101, 100)
    assert found.windows == 1


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "text"
    path.write_text(TEXT)
    ask = [
        "perplexity",
        "--text",
        str(path),
        "--limit",
        "128",
        "--window",
        "64",
        "--backend",
        "cpu",
    ]
    assert main([*ask, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["tokens"], found["windows"]) == (126, 2)
    assert found["by_window"][-1] == found["perplexity"]
    assert main([*ask, "--llama"]) == 0
    out = capsys.readouterr().out
    assert "62 tokens, the second halves of 2 windows of 64" in out


def test_windows_begin_as_texts_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With BOS, if the file asks for it: what stands there else makes no difference then."""
    bos = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 300}
    model = write_model(tmp_path / "m.gguf", metadata=bos)
    found = []
    for i, second in enumerate("34"):
        text = tmp_path / f"{i}"
        text.write_text("1" * 63 + second + "2" * 63)  # BOS, then bytes: a token each
        ask = ["perplexity", str(model), "--text", str(text), "--window", "64", "--backend", "cpu"]
        assert main([*ask, "--llama", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["by_window"])
    assert found[0] == found[1]
    assert len(found[0]) == 2


def test_a_perplexity_that_no_float_holds_is_infinite(capsys: pytest.CaptureFixture[str]) -> None:
    """It was an OverflowError; and in JSON, which has no infinity, it is null."""
    found = Perplexity(windows=1)
    found.add(np.array([[0, 4000], [0, 0]], np.float32), [0, 0])
    assert found.value == np.inf
    assert found.error == np.inf
    accuracy = Accuracy("cpu", 16, predicted=2, nll_sum=4000.0)
    assert (accuracy.perplexity, accuracy.oracle_perplexity) == (np.inf, 1.0)
    command._print(argparse.Namespace(json=True, llama=False, window=4), found)
    assert json.loads(capsys.readouterr().out)["perplexity"] is None
