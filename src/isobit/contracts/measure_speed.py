"""Speed and memory: measures that count only where results are right."""

import json
import math
import os
import subprocess
import time
from statistics import median
from typing import Any

from isobit.backends.base import ARGMAX
from isobit.backends.base.kv_pages import page_bytes
from isobit.contracts import kinds
from isobit.contracts.target import Measured, Target, memory
from isobit.errors import NotRun
from isobit.model.weights import Weights
from isobit.numerics.attention import KV_PAGE
from isobit.runtime.model import Model
from isobit.runtime.sequence import Sequence as TokenSequence


def step_argmax(model: Model, sequence: TokenSequence, token: int) -> int:
    """Run one token: the id of its largest logit, which alone leaves a device that can choose."""
    ids = model.step([sequence], [token], ARGMAX).argmax
    assert ids is not None
    return int(ids[0])


def throughput(measure: kinds.Throughput, target: Target) -> Measured:
    """Tokens a second of greedy decoding, the logits left on the device where it can choose."""
    model = target.model
    prompt = target.rng.integers(0, model.config.vocab, measure.depth + 1).tolist()
    rates = []
    for repeat in range(measure.repeats + 1):
        with model.new_sequence() as sequence:
            token = int(model.prefill(sequence, prompt).argmax())
            start = time.perf_counter()
            for _ in range(4 if repeat == 0 else measure.tokens):
                token = step_argmax(model, sequence, token)
            if repeat:
                rates.append(measure.tokens / (time.perf_counter() - start))
    figures = {"median_tokens_per_second": median(rates)}
    about: dict[str, Any] = {"tokens_per_second": rates}
    if target.peer is not None and "ratio_to_peer" in measure.threshold:
        theirs, build = _peer(target, measure)
        figures["ratio_to_peer"] = figures["median_tokens_per_second"] / theirs
        about |= {"peer_tokens_per_second": theirs, "peer": build}
    return Measured(figures, about)


def _peer(target: Target, measure: kinds.Throughput) -> tuple[float, str]:
    """llama-bench's tokens a second at its best, and its build."""
    on_gpu = not target.model.backend.on_host
    layers = "99" if on_gpu else "0"
    lengths = ["-p", "0", "-n", str(measure.tokens), "-d", str(measure.depth)]
    options = ["-ngl", layers, "-fa", "1", "-r", str(measure.repeats), "-o", "json"]
    if not on_gpu and (threads := target.model.engine.threads) is not None:
        options += ["-t", str(threads)]
    command = [str(target.peer), "-m", str(target.model.path), *lengths, *options]
    rates = []
    try:
        for graphs in ({}, {"GGML_CUDA_GRAPH_OPT": "1"}) if on_gpu else ({},):
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                check=True,
                timeout=600,
                env=os.environ | graphs,
            )
            row = json.loads(done.stdout)[0]
            _require_same_test(row, measure, on_gpu=on_gpu)
            rates.append(float(row["avg_ts"]))
            if not 0 < rates[-1] < math.inf:
                raise NotRun(f"peer: expected tokens a second, llama-bench says {row['avg_ts']}")
        return max(rates), f"llama.cpp {row['build_commit']}"
    except (OSError, subprocess.SubprocessError, ValueError, LookupError, TypeError) as error:
        raise NotRun(f"peer: expected figures of {target.peer}, got: {error}") from None


def _require_same_test(row: dict[str, Any], measure: kinds.Throughput, *, on_gpu: bool) -> None:
    """Raises NotRun where llama-bench timed something else than is promised beside it."""
    for name, wanted in (("n_prompt", 0), ("n_gen", measure.tokens), ("n_depth", measure.depth)):
        if int(row[name]) != wanted:
            raise NotRun(f"peer: expected {name} {wanted}, llama-bench says {row[name]}")
    if on_gpu and not row["gpu_info"]:
        raise NotRun("peer: expected a llama-bench that runs on the GPU too, got one on the CPU")


def memory_used(_: kinds.Memory, target: Target) -> Measured:
    """Memory in use; on the host, weights that are mapped and the KV cache count whether they were
    touched or not."""
    model = target.model
    used, total = memory(model)
    about = {"used_bytes": used, "total_bytes": total, "context": model.context}
    if model.backend.on_host:
        cache = page_bytes(Weights.from_file(model.file)) * -(-model.context // KV_PAGE)
        used = max(used, sum(path.stat().st_size for path in model.file.paths) + cache)
    return Measured({"used_fraction": used / total, "used_gb": used / 1e9}, about)
