"""lm-evaluation-harness through /v1/completions, without torch: its numbers are the library's own.

The tasks are made of Python's standard library, so that no data set is fetched: which of four lines
comes next, the perplexity of a file, and a line to write.
"""

from __future__ import annotations

import importlib
import inspect
import json
import random
from pathlib import Path
from typing import Any

import isobit
from isobit.runtime.model import Model
from tests.suites.common import Score, environment, run, served, version

CONTEXT = 1024
SOURCES = ("textwrap", "bisect", "heapq", "fnmatch", "string")
_TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
target_delimiter: ""
"""
_CHOICE = """
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list:
  - metric: acc
"""
_ROLLING = """
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
"""
_WRITE = """
doc_to_text: "{{context}}"
doc_to_target: "{{line}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 24
metric_list:
  - metric: exact_match
"""


def run_suite(scratch: Path) -> Score:
    """Every number that the harness gets, beside what the library gives alone."""
    bin_ = environment(scratch, "lm-eval[api]")
    score = Score(f"lm-eval {version(bin_, 'lm-eval')}")
    tasks, out = scratch / "tasks", scratch / "out"
    tasks.mkdir(exist_ok=True)
    for old in out.rglob("*.jsonl"):
        old.unlink()
    _write_tasks(tasks)
    with served("sample", "--context", str(CONTEXT)) as url:
        settings = {
            "model": "sample",
            "base_url": f"{url}/v1/completions",
            "tokenizer_backend": "remote",
            "num_concurrent": 4,
            "max_length": CONTEXT,
        }
        run(
            bin_ / "lm_eval",
            *("--model", "local-completions"),
            *("--model_args", ",".join(f"{name}={value}" for name, value in settings.items())),
            *("--tasks", "choice,rolling,write", "--include_path", str(tasks)),
            *("--output_path", str(out), "--log_samples"),
        )
    with isobit.load("sample", backend="cpu", context=CONTEXT) as model:
        for file in sorted(out.rglob("samples_*.jsonl")):
            for line in file.read_text("utf-8").splitlines():
                _compare(model, json.loads(line), score)
    return score


def _compare(model: Model, sample: dict[str, Any], score: Score) -> None:
    for n, asked in enumerate(sample["arguments"].values()):
        given = sample["resps"][n][0]
        if "arg_1" not in asked:  # a text whose log-probability is wanted, from end of text on
            found: object = _rolling(model, asked["arg_0"])
            given = float(given[0] if isinstance(given, list) else given)
        elif isinstance(asked["arg_1"], dict):
            found = _written(model, asked["arg_0"], asked["arg_1"])
        else:
            found = _likelihood(model, asked["arg_0"], asked["arg_1"])
            given = (float(given[0]), str(given[1]) == "True")
        if found == given:
            score.passed += 1
        else:
            score.failed.append(f"{sample['doc_id']}, {n}: expected {found}, got {given}")


def _likelihood(model: Model, context: str, rest: str) -> tuple[float, bool]:
    blank = len(context) - len(context.rstrip())  # the harness moves it to what follows
    if blank:
        context, rest = context[:-blank], context[-blank:] + rest
    before = model.tokenize(context)
    after = model.tokenize(context + rest)[len(before) :]
    values = model.score(before, after)
    rows = model.logits(before + after, range(len(before) - 1, len(before + after) - 1))
    greedy = rows.argmax(axis=1).tolist() == after
    return sum(values.tolist()), greedy


def _rolling(model: Model, text: str) -> float:
    start = model.file.metadata["tokenizer.ggml.eos_token_id"]
    assert isinstance(start, int)
    ids = model.tokenize(text)
    assert len(ids) < CONTEXT, "one window"
    return sum(model.score([start], ids).tolist())


def _written(model: Model, context: str, how: dict[str, Any]) -> str:
    return model.generate(context, max_tokens=how["max_gen_toks"], stop=how["until"]).text


def _write_tasks(folder: Path) -> None:
    rng = random.Random(5)
    rows = {"choice": [], "rolling": [], "write": []}  # type: dict[str, list[dict[str, Any]]]
    for name in SOURCES:
        lines = [f"{line}\n" for line in _source(name).splitlines() if line.strip()]
        rows["rolling"].append({"text": "".join(lines[:40])})
        for i in range(8, len(lines) - 1, 9):
            context, line = "".join(lines[i - 8 : i]), lines[i]
            choices = [line, *rng.sample([other for other in lines if other != line], 3)]
            rng.shuffle(choices)
            gold = choices.index(line)
            rows["choice"].append({"context": context, "choices": choices, "gold": gold})
            rows["write"].append({"context": context, "line": line})
    kinds = {
        "choice": ("multiple_choice", _CHOICE),
        "rolling": ("loglikelihood_rolling", _ROLLING),
        "write": ("generate_until", _WRITE),
    }
    for name, (kind, rest) in kinds.items():
        data = folder / f"{name}.jsonl"
        kept = rows[name][:24]
        data.write_text("".join(json.dumps(row) + "\n" for row in kept), "utf-8")
        task = _TASK.format(name=name, data=data, kind=kind)
        (folder / f"{name}.yaml").write_text(task + rest, "utf-8")


def _source(name: str) -> str:
    return inspect.getsource(importlib.import_module(name))
