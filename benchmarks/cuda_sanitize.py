"""compute-sanitizer on the tests of the CUDA operations and on passes of a model.

usage: python benchmarks/cuda_sanitize.py MODEL.gguf OUT.json [--commit HASH] [--limit 540]
                                          [--tools memcheck,racecheck] [--share 1/1]

memcheck watches the tests that need a GPU, racecheck, which is slower, those of single operations;
they are dealt to some processes. Both watch these passes of MODEL, for which two layers of the
widths that matter will do: a prompt, single steps with few and with many tiles of the cache, steps
of several sequences, of a few rows, and mixed batches. All run side by side. The logs go to OUT's
folder; another tool's or share's results that OUT already has stay. Where the time is too short for
all, --share 2/3 runs every third test from the second on; the passes are the first share's. A run
that found something, that did not end, or whose tests were skipped or failed, ends this with 1.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from batches import batch, origin

from isobit.backends.base import Batch
from isobit.backends.cuda import CudaBackend
from isobit.backends.cuda.fusions import step_attention
from isobit.config import EngineConfig
from isobit.gguf.reader import GGUFFile
from isobit.model.weights import Weights

PARTS = 8
TOOLS = {"memcheck": r"ERROR SUMMARY: (\d+) error", "racecheck": r"RACECHECK SUMMARY: (\d+) hazard"}


def passes(model):
    """Run each kind of pass once; a step is a graph, and bits are another program's
    question."""
    step_attention.FEW_TILES = 2  # so that a short prompt is enough for many
    sequences = 8
    engine = EngineConfig(context=512, max_sequences=sequences, chunk=256)
    weights = Weights.from_file(GGUFFile.open(model))
    backend = CudaBackend(weights, engine)
    seed = int(np.random.SeedSequence().entropy % (1 << 32))
    print("seed", seed, flush=True)
    rng = np.random.default_rng(seed)
    pages = rng.permutation(8 * sequences).astype(np.int32).reshape(sequences, 8)
    tokens = rng.integers(0, weights.config.vocab, 200)
    backend.forward(batch(tokens[:126], 0, pages[:1], [125]))
    for position in range(126, 131):  # the third is the first with many tiles
        backend.forward(batch(tokens[position : position + 1], position, pages[:1], [0]))
    at = np.arange(131, 131 + sequences, dtype=np.int32)
    every = np.arange(sequences, dtype=np.int32)
    for step in range(2):
        backend.forward(Batch(tokens[:sequences].astype(np.int32), at + step, every, pages, every))
    for n in (2, 3, 4, 7):
        few, same = every[:n], np.zeros(n, np.int32)
        backend.forward(Batch(few, at[:n] + 2, few, pages, few))
        backend.forward(Batch(few, 140 + few, same, pages, few))  # of one; seven are a mixed batch
    backend.close()
    print("1 prompt, 5 steps, 2 steps of several sequences and 8 of fewer rows passed")


def real_tests(tool):
    """The names of the tests that need a GPU and that ``tool`` watches."""
    single = "test_cases.py", "test_products.py", "test_cuda_ops.py", "test_merge_of_many_tiles"
    command = [sys.executable, "-m", "pytest", "tests/ops", "--collect-only", "-o", "addopts=-q"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTEST_ADDOPTS"}
    out = subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment
    ).stdout
    names = [line for line in out.splitlines() if re.search(r"::.*[\[-]cuda[\]-]", line)]
    names = [n for n in names if tool == "memcheck" or any(part in n for part in single)]
    if len(names) < PARTS:
        raise SystemExit(
            f"expected the names of tests that need a GPU, got {len(names)}: {out[-500:]}"
        )
    return names


def main():
    p = argparse.ArgumentParser()
    p.add_argument("model")
    p.add_argument("out", type=Path)
    p.add_argument("--commit", default="")
    p.add_argument("--limit", type=float, default=540, help="seconds in all")
    p.add_argument("--tools", default="memcheck,racecheck")
    p.add_argument("--share", default="1/1", help="which of how many shares of the tests")
    p.add_argument("--passes", action="store_true", help="run the passes and nothing else")
    a = p.parse_args()
    if a.passes:
        passes(a.model)
        return
    if not shutil.which("compute-sanitizer"):
        raise SystemExit("not run: no compute-sanitizer on PATH (it comes with the CUDA toolkit)")
    if unknown := set(tools := a.tools.split(",")) - set(TOOLS):
        raise SystemExit(f"--tools: expected {' and '.join(TOOLS)}, got {', '.join(unknown)}")
    share, shares = map(int, a.share.split("/"))
    tests = {tool: real_tests(tool)[share - 1 :: shares] for tool in tools}
    end, runs = time.monotonic() + a.limit, {}
    found = json.loads(a.out.read_text()) if a.out.exists() else {}
    for tool in tools:
        mine = origin(a.model, a.commit) | {"tests": len(tests[tool])}
        found.setdefault(tool, {})[a.share] = mine
        programs = {"passes": [__file__, a.model, str(a.out), "--passes"]} if share == 1 else {}
        for i in range(PARTS):
            part = tests[tool][i::PARTS]
            programs[f"tests-{i}"] = ["-m", "pytest", "-p", "no:cacheprovider", *part]
        for name, program in programs.items():
            log = a.out.with_name(f"{tool}-{name}.log").open("w+")
            options = ["--tool", tool, "--error-exitcode", "1"]
            command = ["compute-sanitizer", *options, sys.executable, *program]
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            runs[tool, name] = process, log
    clean = True
    for (tool, name), (process, log) in runs.items():
        try:
            process.wait(max(1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        text = log.read()
        counts = re.findall(TOOLS[tool], text)
        last = (re.findall(r"^.*\bpassed\b.*$", text, re.M) or ["did not end"])[-1]
        row = {"found": sum(map(int, counts)) if counts else None, "run": last}
        row["clean"] = process.returncode == 0 and row["found"] == 0 and "skipped" not in last
        found[tool][a.share][name] = row
        clean &= row["clean"]
        print(f"{tool:<10} {name:<8} {row}", flush=True)
    a.out.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(not clean)


main()
