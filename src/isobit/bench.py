"""Measuring speed: llama-bench's tests, whole generations, and the memory's read bandwidth."""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import fmean, median, stdev

import numpy as np

from isobit.errors import UsageError
from isobit.runtime.model import Model
from isobit.runtime.sampler import Sampler, Sampling
from isobit.text.tokenizer import StreamDecoder

Progress = Callable[[str], None]
"""Called with what was run, after each warm-up and each repetition; never while the clock runs."""


@dataclass(frozen=True)
class Workload:
    """One row: a prompt of ``n_prompt`` tokens, or ``n_gen`` decode steps, after ``n_depth``
    tokens that are not timed. Exactly one of the first two is 0."""

    n_prompt: int
    n_gen: int
    n_depth: int

    @property
    def name(self) -> str:
        """llama-bench's name, e.g. "pp512" or "tg128 @ d4096"."""
        name = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return f"{name} @ d{self.n_depth}" if self.n_depth else name

    @property
    def length(self) -> int:
        """Positions the sequence needs."""
        return self.n_prompt + self.n_gen + self.n_depth


@dataclass(frozen=True)
class Result:
    """A test's wall times, one for each repetition."""

    test: Workload
    samples_ns: list[int]

    @property
    def samples_ts(self) -> list[float]:
        """Tokens a second, by repetition."""
        tokens = self.test.n_prompt + self.test.n_gen
        return [tokens * 1e9 / ns for ns in self.samples_ns]

    @property
    def avg_ts(self) -> float:
        """Mean of samples_ts."""
        return fmean(self.samples_ts)

    @property
    def stddev_ts(self) -> float:
        """Standard deviation of samples_ts (n - 1); 0 for a single one."""
        return _spread(self.samples_ts)

    @property
    def median_ts(self) -> float:
        """Median of samples_ts."""
        return median(self.samples_ts)

    @property
    def avg_ns(self) -> float:
        """Mean wall time."""
        return fmean(self.samples_ns)

    @property
    def stddev_ns(self) -> float:
        """Standard deviation of the wall times (n - 1)."""
        return _spread(self.samples_ns)


def make_tests(
    n_prompt: Sequence[int], n_gen: Sequence[int], n_depth: Sequence[int]
) -> list[Workload]:
    """Every prompt length and every generation length at every depth; lengths of 0 are left out."""
    for name, values in (("n_prompt", n_prompt), ("n_gen", n_gen), ("n_depth", n_depth)):
        if bad := [v for v in values if not 0 <= v < 1 << 24]:
            raise UsageError(f"{name}: expected 0 to {(1 << 24) - 1} tokens, got {bad[0]}")
    tests = [
        test
        for depth in n_depth
        for test in (
            *(Workload(p, 0, depth) for p in n_prompt if p),
            *(Workload(0, n, depth) for n in n_gen if n),
        )
    ]
    if not tests:
        raise UsageError("n_prompt, n_gen: expected a length above 0 in one of them, got none")
    return tests


def measure(model: Model, test: Workload, repetitions: int, progress: Progress) -> Result:
    """Time a test as llama-bench does: random tokens, one warm-up, no sampling.

    The tokens before ``n_depth`` are run once; after each repetition the sequence is cut back.
    """
    if repetitions < 1:
        raise UsageError(f"repetitions: expected at least 1, got {repetitions}")
    random = np.random.default_rng(0)
    tokens = random.integers(0, model.config.vocab, test.length).tolist()
    before, prompt = tokens[: test.n_depth], tokens[test.n_depth : test.n_depth + test.n_prompt]
    decoded = tokens[test.n_depth + test.n_prompt :]
    samples = []
    with model.new_sequence() as sequence:
        if before:
            model.prefill(sequence, before)
        for repetition in range(repetitions + 1):
            warm_up = repetition == 0
            sequence.length = test.n_depth
            start = time.perf_counter_ns()
            if prompt:
                model.prefill(sequence, prompt)
            for token in decoded[:1] if warm_up else decoded:
                model.step(sequence, token)
            if not warm_up:
                samples.append(time.perf_counter_ns() - start)
            progress(test.name)
    return Result(test, samples)


@dataclass(frozen=True)
class Generation:
    """One whole generation, from text to text."""

    prompt_tokens: int
    token_ns: list[int]
    """Time from the start to each generated token."""
    total_ns: int

    @property
    def gaps_ns(self) -> list[int]:
        """Time from each token to the next."""
        return [b - a for a, b in zip(self.token_ns, self.token_ns[1:], strict=False)]


def measure_generations(
    model: Model,
    prompt: str | Sequence[int],
    *,
    max_tokens: int,
    warmup: int,
    iterations: int,
    progress: Progress,
) -> list[Generation]:
    """Time whole greedy generations: tokenize, prefill, sample, decode, detokenize.

    The first ``warmup`` of them are not reported. One that the model ends early is shorter.
    """
    for name, value, least in (
        ("max_tokens", max_tokens, 1),
        ("warmup", warmup, 0),
        ("iterations", iterations, 1),
    ):
        if value < least:
            raise UsageError(f"{name}: expected at least {least}, got {value}")
    with model.stream(prompt, max_tokens=0):  # refuses a prompt that does not fit
        pass
    results = []
    for _ in range(warmup + iterations):
        results.append(_generate(model, prompt, max_tokens))
        progress("generation")
    return results[warmup:]


def _generate(model: Model, prompt: str | Sequence[int], max_tokens: int) -> Generation:
    sampler = Sampler(Sampling())
    times: list[int] = []
    start = time.perf_counter_ns()
    ids = model.tokenize(prompt) if isinstance(prompt, str) else prompt
    decoder = StreamDecoder(model.tokenizer)
    with model.new_sequence() as sequence:
        logits = model.prefill(sequence, ids)
        limit = min(max_tokens, model.context - len(ids))
        while len(times) < limit:
            token = sampler.choose(logits, ids)
            times.append(time.perf_counter_ns() - start)
            if token in model.tokenizer.stop_ids:
                break
            decoder.push(token)
            if len(times) < limit:
                logits = model.step(sequence, token)
    return Generation(len(ids), times, time.perf_counter_ns() - start)


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_bandwidth(model: Model) -> float | None:
    """Bytes a second that the model's backend can read from the memory its weights lie in.

    None if a device does not say. On the host: all threads together, the best of five passes over
    512 MiB, which is far beyond any cache.
    """
    if hasattr(model.backend, "read_bandwidth"):
        return float(model.backend.read_bandwidth())
    if model.backend.name not in ("reference", "cpu"):
        return None
    threads = model.engine.threads or usable_cores()
    parts = [np.ones((512 << 20) // threads // 8, np.uint64) for _ in range(threads)]
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))
            best = min(best, time.perf_counter() - start)
    return sum(p.nbytes for p in parts) / best


def _spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0
