"""Measures accuracy on the sample model and records it: benchmarks/results/accuracy.json.

``python -m tests.model.record_accuracy`` takes minutes and prints the tables of docs/accuracy.md.
``--text FILE --windows N`` adds N sequences of 512 tokens, evenly spaced through another text.
"""

import argparse
import json
import subprocess
from dataclasses import asdict
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

from isobit.numerics import VERSION
from tests.helpers import passes
from tests.model import huggingface
from tests.model.accuracy import ROOT, SAMPLE, TEXT, Accuracy, measure, tokens_of
from tests.model.oracle import Oracle

RESULT = ROOT / "benchmarks/results/accuracy.json"
RUNS = ("float32 (transformers)", "planes 2", "planes 1")


def measured(text: Path, windows: int, length: int, backend: str) -> dict[str, object]:
    """Every run over ``windows`` sequences of ``length`` tokens; their mean and their worst."""
    ids = tokens_of(text)
    step = (len(ids) - length) // max(windows - 1, 1)
    oracle = Oracle(SAMPLE)
    transformer = huggingface.build(oracle)
    found: dict[str, list[Accuracy]] = {name: [] for name in RUNS}
    for i in range(windows):
        expected = oracle.run(ids[i * step : i * step + length])
        found[RUNS[0]].append(
            Accuracy.of(expected, *huggingface.run(transformer, expected.ids.tolist()))
        )
        for name, planes in (("planes 2", 2), ("planes 1", 1)):
            found[name].append(measure(SAMPLE, expected, backend, planes))
    return {
        "text": text.name,
        "text_sha256": sha256(text.read_bytes()).hexdigest(),
        "sequences": windows,
        "tokens_each": length,
        "runs": {
            name: {
                "mean": asdict(Accuracy.mean(results)),
                "mean_kl_of_each": [r.mean_kl for r in results],
                "changed_sets_of_each": [r.changed_sets for r in results],
                "top1_kept_of_each": [r.top1_kept for r in results],
                "perplexity_change_of_each": [r.perplexity_change for r in results],
            }
            for name, results in found.items()
        },
    }


def table(part: dict[str, object]) -> str:
    """A part as the rows of docs/accuracy.md."""
    lines = [
        f"{part['sequences']} x {part['tokens_each']} tokens of {part['text']}",
        "| activations | mean KL | changed expert sets | top-1 kept | perplexity |",
        "|---|---|---|---|---|",
    ]
    for name, run in part["runs"].items():  # type: ignore[attr-defined]
        mean = Accuracy(**run["mean"])
        lines.append(
            f"| {name} | {mean.mean_kl:.1e} | {100 * mean.changed_sets:.3f} % | "
            f"{100 * mean.top1_kept:.2f} % | {mean.perplexity:.4f} "
            f"({100 * mean.perplexity_change:+.4f} %) |"
        )
    return "\n".join(lines)


def _git(*arguments: str) -> str:
    return subprocess.check_output(["git", *arguments], cwd=ROOT, text=True).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="cpu", choices=passes.BACKENDS)
    parser.add_argument("--text", type=Path, help="another held-out text")
    parser.add_argument("--windows", type=int, default=48)
    options = parser.parse_args()
    parts = [(TEXT, 1, 4096), (TEXT, 8, 512)]
    if options.text:
        parts.append((options.text, options.windows, 512))
    results = [measured(*part, options.backend) for part in parts]
    with passes.backend_of(SAMPLE, options.backend) as backend:
        device = backend.device
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", "src", "tests")),
        "numerics_version": VERSION,
        "backend": options.backend,
        "device": device,
        "model": SAMPLE.name,
        "model_sha256": sha256(SAMPLE.read_bytes()).hexdigest(),
        "results": results,
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(record, indent=1) + "\n")
    print(*map(table, results), sep="\n\n")


if __name__ == "__main__":
    main()
