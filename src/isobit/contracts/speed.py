"""Speed and memory: measures that count only where results are right."""

import json
import os
import subprocess
import time
from statistics import median
from typing import Any

from isobit.contracts import measures as m
from isobit.contracts.subject import Measured, Subject, memory
from isobit.errors import NotRun


def throughput(measure: m.Throughput, subject: Subject) -> Measured:
    """Tokens a second of greedy decoding, the logits left on the device where it can choose."""
    model = subject.model
    prompt = subject.rng.integers(0, model.config.vocab, measure.depth + 1).tolist()
    rates = []
    for repeat in range(measure.repeats + 1):
        with model.new_sequence() as sequence:
            token = int(model.prefill(sequence, prompt).argmax())
            start = time.perf_counter()
            for _ in range(4 if repeat == 0 else measure.tokens):
                chosen = model.likeliest(sequence, token)
                if chosen is None:
                    chosen = int(model.step(sequence, token).argmax())
                token = chosen
            if repeat:
                rates.append(measure.tokens / (time.perf_counter() - start))
    figures = {"median_tokens_per_second": median(rates)}
    about: dict[str, Any] = {"tokens_per_second": rates}
    if subject.peer is not None and "ratio_to_peer" in measure.threshold:
        theirs, build = _peer(subject, measure)
        figures["ratio_to_peer"] = figures["median_tokens_per_second"] / theirs
        about |= {"peer_tokens_per_second": theirs, "peer": build}
    return Measured(figures, about)


def _peer(subject: Subject, measure: m.Throughput) -> tuple[float, str]:
    """llama-bench's tokens a second at its best, and its build."""
    layers = "99" if subject.model.backend.name == "cuda" else "0"
    lengths = ["-p", "0", "-n", str(measure.tokens), "-d", str(measure.depth)]
    options = ["-ngl", layers, "-fa", "1", "-r", str(measure.repeats), "-o", "json"]
    command = [str(subject.peer), "-m", str(subject.model.path), *lengths, *options]
    rates = []
    try:
        for graphs in ({}, {"GGML_CUDA_GRAPH_OPT": "1"}) if layers == "99" else ({},):
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                check=True,
                timeout=600,
                env=os.environ | graphs,
            )
            row = json.loads(done.stdout)[0]
            rates.append(float(row["avg_ts"]))
        return max(rates), f"llama.cpp {row['build_commit']}"
    except (OSError, subprocess.SubprocessError, ValueError, LookupError) as error:
        raise NotRun(f"peer: expected figures of {subject.peer}, got: {error}") from None


def memory_used(_: m.Memory, subject: Subject) -> Measured:
    """Memory in use, of all there is."""
    used, total = memory(subject.model)
    about = {"used_bytes": used, "total_bytes": total, "context": subject.model.context}
    return Measured({"used_fraction": used / total}, about)
