"""The CUDA backend's bits against the CPU backend's on one model, in every way of running it.

usage: python benchmarks/cuda_exact.py MODEL.gguf OUT.json [--commit HASH] [--steps 64]

For 1 and 2 activation planes: prompts and decode steps token by token against the CPU, twice; a
longer prompt in chunks of 1, 7, 512 and whole; 8 and 32 sequences together against each alone.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from batches import origin

from isobit import numerics
from isobit.config import EngineConfig
from isobit.runtime.model import Model

PROMPTS = ([785, 9217, 308], [785], [785, 374, 264, 6716], [750, 220, 17, 220, 488, 220, 17, 30])
SAMPLE_PROMPTS = ([5, 17, 308], [785], [785, 374, 264, 6716], [750, 220, 17, 220, 488, 220, 17, 30])
LONG = 530


def generated(model, prompt, steps, tokens=None):
    """Logits of the prompt's last token and of greedy steps (or of given tokens) after it."""
    with model.new_sequence() as sequence:
        rows = [np.array(model.prefill(sequence, prompt))]
        for i in range(steps):
            token = int(rows[-1].argmax()) if tokens is None else tokens[i]
            rows.append(np.array(model.step([sequence], [token]).logits[0]))
    return np.stack(rows)


def chunked(model, prompt, size):
    with model.new_sequence() as sequence:
        for i in range(0, len(prompt), size):
            logits = model.forward(sequence, prompt[i : i + size], [len(prompt[i : i + size]) - 1])
        return np.array(logits[0])


def together(model, prompts, texts):
    """Logits of steps of all sequences at once: [sequence, step, vocabulary]."""
    sequences = [model.new_sequence() for _ in prompts]
    for sequence, prompt in zip(sequences, prompts, strict=True):
        model.prefill(sequence, prompt)
    steps = [np.array(model.step(sequences, t).logits) for t in zip(*texts, strict=True)]
    for sequence in sequences:
        sequence.close()
    return np.stack(steps, 1)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("model")
    p.add_argument("out")
    p.add_argument("--commit", default="")
    p.add_argument("--steps", type=int, default=64)
    a = p.parse_args()
    found = origin(a.model, a.commit) | {"numerics": numerics.VERSION}
    total = wrong = 0

    def compare(name, ours, theirs):
        nonlocal total, wrong
        differing = int(np.count_nonzero(ours.view(np.uint32) != theirs.view(np.uint32)))
        total, wrong = total + ours.size, wrong + differing
        found[name] = f"{differing} of {ours.size} differ"
        print(f"{name:<56} {found[name]}", flush=True)

    for planes in (2, 1):
        small = EngineConfig(activation_bits=8 * planes, context=640, max_sequences=1)
        many = EngineConfig(activation_bits=8 * planes, context=640, max_sequences=32)
        start = time.perf_counter()
        with Model(a.model, "cuda", many) as gpu, Model(a.model, "cpu", small) as cpu:
            found |= {"device": gpu.backend.device, "cpu": cpu.backend.device}
            vocab = gpu.config.vocab
            prompts = PROMPTS if vocab > 10_000 else SAMPLE_PROMPTS
            texts, alone = [], []
            for prompt in prompts:
                ours = generated(gpu, prompt, a.steps)
                tokens = ours.argmax(-1).tolist()
                compare(
                    f"planes {planes}, prompt {prompt}, {a.steps} steps",
                    ours,
                    generated(cpu, prompt, a.steps, tokens),
                )
                again = generated(gpu, prompt, a.steps)
                compare(f"planes {planes}, prompt {prompt}, once more", again, ours)
                texts.append(tokens[: a.steps])
                alone.append(ours[1:])
            rng = np.random.default_rng()
            long = rng.integers(0, vocab, LONG).tolist()
            whole = chunked(cpu, long, LONG)
            for size in (1, 7, 512, LONG):
                compare(f"planes {planes}, chunks of {size}", chunked(gpu, long, size), whole)
            for n in (8, 32):
                which = [i % len(prompts) for i in range(n)]
                ours = together(gpu, [prompts[i] for i in which], [texts[i] for i in which])
                theirs = np.stack([alone[i] for i in which])
                compare(f"planes {planes}, {n} sequences together", ours, theirs)
        found[f"planes {planes} seconds"] = round(time.perf_counter() - start, 1)
    found["differing"], found["compared"] = wrong, total
    Path(a.out).write_text(json.dumps(found, indent=1) + "\n")
    raise SystemExit(wrong > 0)


main()
