"""A model over several GPUs beside one: bits first, then how fast each is, what a lost GPU does,
and a model that does not fit one GPU.

usage: python benchmarks/cuda_parts.py MODEL OUT [--seconds 470] [--parts 2] [--layers N]
       [--expert-shares 1,1]

MODEL is a GGUF file, or 30b-a3b: that geometry with synthetic weights (synthetic.py), which needs
no file. Every stage is a process that is ended when its time is over, so that one that hangs loses
only itself; OUT/STAGE.json is written as figures come, the table comes last. With fewer GPUs than
parts all parts run on the first, which shows bits and no speed. The exit code is 1 if a bit differs
or a stage has not ended well.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from batches import origin
from kernels import asked, compile_all
from parts_bits import LARGE, bits, large, lost
from parts_marks import marks
from parts_models import FEW, Notes, devices, gpu_count, opened
from parts_speed import nccl, rates, timeline

from isobit.config import EngineConfig
from isobit.model.parallel.split import split
from isobit.model.weights import Weights

STAGES = {  # seconds that each may take
    "compile": 150,
    "few_layers": 60,
    "bits": 110,
    "rates": 110,
    "lost": 60,
    "one_plane": 90,
    "large": 150,
    "timeline": 60,
    "marks": 100,
    "nccl": 30,
}


def compile_for_all(a, note):
    """Every kernel of every stage, by all cores."""
    gpu = devices(1)[0]
    kernels = {("device/repack", ()), ("ops/add", ())}
    large = "large" in a.only and gpu_count() >= a.parts
    for name in dict.fromkeys((a.model, LARGE) if large else (a.model,)):
        weights = opened(name, 8)
        cut = partial(split, weights.graph, parts=a.parts, expert_shares=a.expert_shares)
        graphs = [weights.graph] + [cut(r).graph for r in range(a.parts)]
        for planes in (2, 1):
            engine = EngineConfig(8 * planes, context=1024, max_sequences=130, chunk=2048)
            for graph in graphs:
                kernels |= asked(Weights(weights.config, graph), engine, gpu)
    note("kernels", len(kernels))
    note("MB", compile_all(kernels, gpu.arch) / 1e6)


WORK = {
    "nccl": nccl,
    "marks": marks,
    "compile": compile_for_all,
    "few_layers": partial(bits, layers=FEW, cpu_seconds=30),
    "bits": bits,
    "rates": rates,
    "lost": lost,
    "one_plane": partial(bits, planes=1, cpu_seconds=10),
    "large": large,
    "timeline": timeline,
}


# All of it


def run(a, stage, seconds):
    """A stage as a process; how it ended."""
    command = [sys.executable, __file__, a.model, a.out, "--stage", stage]
    command += ["--parts", str(a.parts)] + (["--layers", str(a.layers)] if a.layers else [])
    shares = ",".join(map(str, a.expert_shares))
    command += (["--expert-shares", shares] if shares else []) + ["--only", *a.only]
    child = subprocess.Popen(command, start_new_session=True)
    try:
        code = child.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        return f"ended after {seconds:.0f} s"
    return "ok" if code == 0 else f"exit code {code}"


def table(out, ended):
    """The figures, and whether all is well."""
    found, well = {"ended": ended}, True
    for stage, how in ended.items():
        path = Path(out) / f"{stage}.json"
        found[stage] = json.loads(path.read_text()) if path.exists() else {}
        wrong = found[stage].get("wrong", 0)
        well &= how == "ok" and not wrong
        print(f"{stage:<24} {how}, {found[stage].get('seconds', '-')} s, wrong: {wrong}")
    for name, row in found.get("rates", {}).items():
        if isinstance(row, dict) and "ratio" in row:
            one, many = (v for k, v in row.items() if k.endswith("tokens/s"))
            spread = f"({row['from']} to {row['to']})"
            print(f"{name:<24} {one:10.1f} {many:10.1f}  x {row['ratio']} {spread}")
    for name, row in found.get("marks", {}).items():
        if isinstance(row, dict):
            print(f"{name}: {row['us a step']} us a step, guessed {row['guessed']}")
            for point, ns in row["ns: first, median, last, blocks"].items():
                print(f"  {point:24}", *(f"{n:7d}" for n in ns))
    for name, row in found.get("timeline", {}).items():
        if isinstance(row, dict):
            print(
                f"{name}: {row['us a pass']} us a pass, {row['launches a layer']} launches a layer"
            )
            for k in row["kernels"][:13]:
                print(f"  {k['a pass']:5.1f} x {k['kernel'][:34]:<34} {k['grid']:<12}", end="")
                print(f"{k['own']:8.2f} {k['alone']:8.2f} {k['us a pass']:9.1f}")
    return found, well


def main():
    p = argparse.ArgumentParser()
    p.add_argument("model")
    p.add_argument("out")
    p.add_argument("--seconds", type=float, default=470)
    p.add_argument("--parts", type=int, default=2)
    p.add_argument("--layers", type=int)
    p.add_argument("--expert-shares", type=lambda text: [*map(int, text.split(","))], default=())
    p.add_argument("--stage", choices=STAGES)
    p.add_argument("--only", nargs="+", choices=STAGES, default=STAGES)
    p.add_argument("--commit", default="")
    a = p.parse_args()
    if a.stage:
        WORK[a.stage](a, Notes(a))
        return
    end, ended = time.perf_counter() + a.seconds, {}
    Path(a.out).mkdir(parents=True, exist_ok=True)
    for stage in a.only:
        left = end - time.perf_counter() - 3
        if left < 10:
            ended[stage] = "not run: no time"
            continue
        print(f"{stage} ({a.seconds - left - 3:.0f} s)", flush=True)
        ended[stage] = run(a, stage, min(left, STAGES[stage]))
    found, well = table(a.out, ended)
    found = origin(a.model, a.commit) | {"GPUs": gpu_count()} | found
    (Path(a.out) / "cuda_parts.json").write_text(json.dumps(found, indent=1) + "\n")
    raise SystemExit(not well)


if __name__ == "__main__":
    main()
