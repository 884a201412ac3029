"""Steps of several sequences together, the gate before every speed, and what bench prints."""

import csv
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from isobit import bench
from isobit.cli import main
from isobit.config import EngineConfig
from isobit.contracts.target import sample_digest
from isobit.errors import ContextFull, GateFailed, UsageError
from isobit.runtime.model import Model


@pytest.fixture
def model():
    engine = EngineConfig(context=80, max_sequences=3)
    with Model("sample", "cpu", engine) as opened:
        yield opened


def test_steps_together_have_the_bits_of_steps_alone(
    model: Model, rng: np.random.Generator
) -> None:
    prompts = [rng.integers(0, model.config.vocab, n).tolist() for n in (1, 70, 9)]
    tokens = rng.integers(0, model.config.vocab, 3).tolist()
    alone = []
    for prompt, token in zip(prompts, tokens, strict=True):
        with model.new_sequence() as sequence:
            model.prefill(sequence, prompt)
            alone.append(np.array(model.step([sequence], [token]).logits[0]))
    sequences = [model.new_sequence() for _ in prompts]
    for sequence, prompt in zip(sequences, prompts, strict=True):
        model.prefill(sequence, prompt)
    together = model.step(sequences, tokens).logits
    assert np.array_equal(together.view(np.uint32), np.stack(alone).view(np.uint32))
    assert [s.length for s in sequences] == [2, 71, 10]
    for sequence in sequences:
        sequence.close()


def test_a_full_sequence_among_others_takes_no_position_of_theirs(model: Model) -> None:
    with model.new_sequence() as one, model.new_sequence() as full:
        model.prefill(one, [1, 2])
        model.prefill(full, [3] * 80)
        with pytest.raises(ContextFull):
            model.step([one, full], [4, 5])
        assert (one.length, full.length) == (2, 80)


def test_speed_is_told_of_right_answers(model: Model) -> None:
    assert bench.check_bits(model, 3) == (bench.CHECKED + 3) * model.config.vocab


def test_one_wrong_bit_has_no_speed(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    right = model.backend

    def run(batch, *others):
        results = right.run(batch, *others)
        if len(batch.pages) == 3:  # only in a step of all
            results.logits[2, 5] = np.nextafter(results.logits[2, 5], np.float32(np.inf))
        return results

    wrong = SimpleNamespace(
        name="cuda", run=run, on_host=False, reads_file=False, losses=0, on_device=frozenset()
    )
    monkeypatch.setattr(model, "backend", wrong)
    with pytest.raises(GateFailed, match=f"^1 of {(bench.CHECKED + 3) * model.config.vocab}"):
        bench.check_bits(model, 3)
    monkeypatch.undo()


def test_a_whole_generation_is_what_generate_does(model: Model) -> None:
    seen: list[tuple[str, int]] = []
    [one] = bench.measure_generations(
        model,
        "def f(",
        max_tokens=5,
        warmup=1,
        iterations=1,
        progress=lambda *run: seen.append(run),
    )
    assert seen == [("generation", 1)] * 2
    assert len(one.token_ns) == len(model.generate("def f(", max_tokens=5).token_ids) == 5
    assert one.token_ns[0] > 0
    assert one.token_ns == sorted(one.token_ns)
    assert one.token_ns[-1] <= one.total_ns
    assert one.prompt_tokens == len(model.tokenize("def f("))


def test_what_lies_before_a_test_is_told_as_it_is_read(model: Model) -> None:
    """With a long -d there was no sign of life before the first run."""
    seen: list[tuple[str, int]] = []
    [test] = bench.make_tests([2], [], [40])
    model.engine = replace(model.engine, chunk=16)
    bench.measure(model, test, 1, lambda *run: seen.append(run))
    way = [(f"pp2 @ d40: {n} of 40 tokens before", 0) for n in (16, 32, 40)]
    warming = ("pp2 @ d40: warming up, 2 of 2 tokens", 0)  # nor a word while the clock runs
    assert seen == [*way, warming, (test.name, 1), (test.name, 1)]


def test_a_prompt_that_fills_the_context_has_no_generation(model: Model) -> None:
    with pytest.raises(UsageError, match="fewer tokens than the context of 80, got 80"):
        bench.measure_generations(
            model, [1] * 80, max_tokens=1, warmup=0, iterations=1, progress=print
        )


GENERATION = ["--tokens", "1,2", "--max-tokens", "2", "--warmup", "0", "--iterations", "1"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The beginning of a bench command; the read bandwidth, a second to measure, is given."""
    monkeypatch.setattr("isobit.backends.base.read_bandwidth", lambda _: 1e10)
    return ["bench", "--backend", "cpu"]


@pytest.mark.parametrize("test", [["-p", "2", "-n", "0", "-r", "1"], GENERATION])
def test_every_format_that_names_the_model_has_its_digest(
    quick: list[str], capsys: pytest.CaptureFixture[str], test: list[str]
) -> None:
    found = {}
    for form in ("json", "jsonl", "csv"):
        assert main([*quick, *test, "-o", form]) == 0
        out = capsys.readouterr().out
        rows = csv.DictReader(out.splitlines()) if form == "csv" else np.ravel(json.loads(out))
        found[form] = [row["model_sha256"] for row in rows]
    assert found == {form: [sample_digest()] for form in ("json", "jsonl", "csv")}


def test_table(quick: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*quick, "-p", "2", "-n", "0", "-r", "1"]) == 0
    out, err = capsys.readouterr()
    header, _, row = out.splitlines()
    assert [c.strip() for c in header.split("|")[1:4]] == ["model", "size", "params"]
    assert re.search(r"\| +pp2 +\| +[\d.]+ ± 0.00 \|", row)
    assert err == ""  # no progress bar where there is no terminal
    assert "| qwen3moe Q4_K_M, 16 experts, 4 used |" in row


def test_whole_generations_show_tokens_a_second(
    quick: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*quick, "--tokens", "5", "--max-tokens", "2", "--iterations", "1"]) == 0
    header, _, row = capsys.readouterr().out.splitlines()
    cells = dict(zip(*([c.strip() for c in x.split("|")] for x in (header, row)), strict=True))
    assert re.fullmatch(r"[\d.]+ ± 0.00", cells["t/s"])


def test_json_as_the_other_commands_have_it(
    quick: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*quick, "-p", "1", "-n", "0", "-r", "1", "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert row["model_type"] == "qwen3moe Q4_K_M"
    assert (row["n_experts"], row["n_experts_used"]) == (16, 4)


@pytest.mark.parametrize(
    ("said", "formats", "name"),
    [
        (15, {"Q4_K": 4, "Q6_K": 9}, "Q4_K_M"),  # most of its bytes are Q6_K
        (14, {"Q4_K": 4, "Q6_K": 2}, "Q4_K_S"),
        (15, {"Q6_K": 9, "F32": 1}, "Q6_K"),  # a file that says what it is not
        (None, {"Q4_K": 4, "Q6_K": 9}, "Q6_K"),
        (7, {"Q8_0": 9, "F32": 1}, "Q8_0"),
        ("odd", {"F16": 9}, "F16"),
    ],
)
def test_the_name_of_a_quantisation(said: object, formats: dict[str, int], name: str) -> None:
    tensors = {
        f: SimpleNamespace(format=SimpleNamespace(name=f), nbytes=n) for f, n in formats.items()
    }
    file = SimpleNamespace(tensors=tensors, metadata={"general.file_type": said})
    assert bench.quantisation(file) == name  # type: ignore[arg-type]


def test_sequences_together_share_what_is_read(
    quick: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*quick, "-p", "0", "-n", "1", "-s", "1,2", "-r", "1", "-o", "json"]) == 0
    alone, together = json.loads(capsys.readouterr().out)
    assert (alone["n_sequences"], together["n_sequences"]) == (1, 2)
    assert alone["fraction_of_read_bandwidth"] > 0
    assert together["fraction_of_read_bandwidth"] is None


def test_whole_generations(quick: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--prompt", "def f(n):", "--max-tokens", "3", "--warmup", "1", "--iterations", "2"]
    assert main([*quick, *args, "-o", "json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert row["total_tokens"] == 6
    assert row["samples_tokens"] == [3, 3]
    assert row["total_time_ms"] == pytest.approx(sum(row["samples_total_ms"]))
    assert 0 < row["ttft_ms"] < row["total_time_ms"]
    assert 0 < row["token_ms_p50"] <= row["token_ms_p95"] <= row["token_ms_p99"]
    read = row["active_bytes_per_token"] * 1e3 / row["token_ms_p50"]
    assert row["fraction_of_read_bandwidth"] == pytest.approx(read / 1e10)
    assert row["samples_ts"] == pytest.approx([3e3 / ms for ms in row["samples_total_ms"]])
    assert row["avg_ts"] == pytest.approx(sum(row["samples_ts"]) / 2)
    one = ["--tokens", "5", "--max-tokens", "1", "--iterations", "1", "-o", "json"]
    assert main([*quick, *one]) == 0
    assert json.loads(capsys.readouterr().out)[0]["token_ms_p50"] is None
