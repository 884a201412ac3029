"""Measuring speed: llama-bench's tests, whole generations, and the memory's read bandwidth."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from statistics import fmean, median, stdev

import numpy as np

from isobit.backends.base import F32
from isobit.errors import GateFailed, UsageError
from isobit.gguf.formats import FILE_TYPES
from isobit.gguf.reader import GGUFFile
from isobit.runtime.model import Model

MOST_SEQUENCES = 1024
CHECKED = 8
"""Tokens of a prompt that is held against the CPU backend."""

Progress = Callable[[str, int], None]
"""Called with what was run and how many runs that makes more: 1 after each warm-up and each
repetition, 0 on the way to a warm-up; never while the clock runs."""


@dataclass(frozen=True)
class Workload:
    """One row: a prompt of ``n_prompt`` tokens, or ``n_gen`` decode steps of ``n_sequences``
    sequences together, after ``n_depth`` tokens that are not timed. One of the first two is 0."""

    n_prompt: int
    n_gen: int
    n_depth: int
    n_sequences: int = 1

    @property
    def name(self) -> str:
        """llama-bench's name, e.g. "pp512" or "tg128 @ d4096"; with sequences "tg128 x 32"."""
        name = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        name += f" x {self.n_sequences}" if self.n_sequences > 1 else ""
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
        tokens = self.test.n_prompt + self.test.n_gen * self.test.n_sequences
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
    n_prompt: Sequence[int],
    n_gen: Sequence[int],
    n_depth: Sequence[int],
    n_sequences: Sequence[int] = (1,),
) -> list[Workload]:
    """Every prompt length, and every generation length with every number of sequences, at every
    depth; lengths of 0 are left out."""
    if bad := [n for n in n_sequences if not 1 <= n <= MOST_SEQUENCES]:
        raise UsageError(f"n_sequences: expected 1 to {MOST_SEQUENCES}, got {bad[0]}")
    for name, values in (("n_prompt", n_prompt), ("n_gen", n_gen), ("n_depth", n_depth)):
        if bad := [v for v in values if not 0 <= v < 1 << 24]:
            raise UsageError(f"{name}: expected 0 to {(1 << 24) - 1} tokens, got {bad[0]}")
    tests = [
        test
        for depth in n_depth
        for test in (
            *(Workload(p, 0, depth) for p in n_prompt if p),
            *(Workload(0, n, depth, many) for n in n_gen if n for many in n_sequences),
        )
    ]
    if not tests:
        raise UsageError("n_prompt, n_gen: expected a length above 0 in one of them, got none")
    return tests


def quantisation(file: GGUFFile) -> str:
    """What people call a file: the mix that it says it is, if its tensors have that mix's type;
    else the type of most of its matrices' bytes."""
    sizes: dict[str, int] = {}
    for t in file.tensors.values():
        sizes[t.format.name] = sizes.get(t.format.name, 0) + t.nbytes
    said = file.metadata.get("general.file_type")
    mix = FILE_TYPES.get(said, "") if isinstance(said, int) else ""
    return mix if mix and mix.rsplit("_", 1)[0] in sizes else max(sizes, key=lambda n: sizes[n])


def measure(
    model: Model,
    test: Workload,
    repetitions: int,
    progress: Progress,
    samples: list[int] | None = None,
) -> Result:
    """Time a test as llama-bench does: random tokens, one warm-up, no sampling.

    ``samples`` is the list that wall times are appended to, for a caller who wants those that were
    taken before an interruption. The tokens before ``n_depth`` are run once; after each
    repetition the sequence is cut back.
    """
    random = np.random.default_rng(0)
    vocab, many = model.config.vocab, test.n_sequences
    tokens = random.integers(0, vocab, test.length).tolist()
    before, prompt = tokens[: test.n_depth], tokens[test.n_depth : test.n_depth + test.n_prompt]
    decoded = random.integers(0, vocab, (test.n_gen, many)).tolist()
    samples = [] if samples is None else samples

    def warming(n: int, all: int) -> None:
        progress(f"{test.name}: warming up, {n:,} of {all:,} tokens", 0)

    with ExitStack() as stack:
        sequences = [stack.enter_context(model.new_sequence()) for _ in range(many)]
        for sequence in sequences if before else []:
            model.prefill(
                sequence,
                before,
                progress=lambda n, all: progress(f"{test.name}: {n:,} of {all:,} tokens before", 0),
            )
        for repetition in range(repetitions + 1):
            warm_up = repetition == 0
            for sequence in sequences:
                sequence.length = test.n_depth
            start = time.perf_counter_ns()
            if prompt:
                model.prefill(sequences[0], prompt, warming if warm_up else None)
            for step in decoded[:1] if warm_up else decoded:
                model.step(sequences, step)
            if not warm_up:
                samples.append(time.perf_counter_ns() - start)
            progress(test.name, 1)
    return Result(test, samples)


def check_bits(model: Model, sequences: int = 1) -> int:
    """Hold a short prompt, and a step of that many sequences, against the CPU backend.

    Returns how many logits were compared: all have the same bits. Raises GateFailed if one has not:
    there is no point in the speed of wrong answers.
    """
    rng = np.random.default_rng()
    prompts = rng.integers(0, model.config.vocab, (sequences, CHECKED)).tolist()
    following = rng.integers(0, model.config.vocab, sequences).tolist()
    engine = replace(model.engine, context=min(model.context, 64), max_sequences=sequences)

    def logits(of: Model) -> F32:
        with ExitStack() as stack:
            each = [stack.enter_context(of.new_sequence()) for _ in prompts]
            first = of.forward(each[0], prompts[0], range(CHECKED))
            for sequence, prompt in zip(each[1:], prompts[1:], strict=True):
                of.forward(sequence, prompt[:1])
            step = of.step(each, following).logits
            assert step is not None
            return np.concatenate([first, step])

    with Model(model.path, "cpu", engine) as reference:
        ours, theirs = logits(model), logits(reference)
    differing = int(np.count_nonzero(ours.view(np.uint32) != theirs.view(np.uint32)))
    if differing:
        raise GateFailed(
            f"{differing} of {ours.size} logits differ from the CPU backend's; no speed is told of "
            f"wrong answers (isobit verify {model.path} --backend {model.backend.name} finds where)"
        )
    return int(ours.size)


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
    results: list[Generation] | None = None,
) -> list[Generation]:
    """Time whole greedy generations: tokenize, prefill, sample, decode, detokenize.

    The first ``warmup`` of them are not reported. One that the model ends early is shorter.
    ``results`` is the list that they are appended to, as in :func:`measure`.
    """
    results = [] if results is None else results
    for i in range(warmup + iterations):
        done = _generate(model, prompt, max_tokens)
        if i >= warmup:
            results.append(done)
        progress("generation", 1)
    return results


def _generate(model: Model, prompt: str | Sequence[int], max_tokens: int) -> Generation:
    start = time.perf_counter_ns()
    with model.stream(prompt, max_tokens=max_tokens, salt=None) as stream:
        for _ in stream:
            pass
    total = time.perf_counter_ns() - start
    assert stream.completion is not None
    if not stream.token_ns:  # nor was the prompt run
        n_prompt = len(model.tokenize(prompt) if isinstance(prompt, str) else prompt)
        raise UsageError(
            f"prompt: expected fewer tokens than the context of {model.context}, got {n_prompt}"
        )
    times = [ns - start for ns in stream.token_ns]
    return Generation(stream.completion.timings.prefill_tokens, times, total)


def _spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0
