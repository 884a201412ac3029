"""``isobit bench``: tokens per second in llama-bench's vocabulary, or whole generations."""

import argparse
import csv
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from math import prod
from statistics import fmean, median, stdev
from typing import Any

import numpy as np

from isobit import __version__, bench, numerics
from isobit.cli import argtypes, options, prompt_options, say
from isobit.cli.output import bar, busy, print_table, progress_bar, size
from isobit.errors import UsageError
from isobit.inspect import active_bytes
from isobit.runtime.model import Model

TEST_DEFAULTS: dict[str, Any] = {
    "n_prompt": [512],
    "n_gen": [128],
    "n_depth": [0],
    "n_sequences": [1],
    "repetitions": 5,
}
GENERATION_DEFAULTS: dict[str, Any] = {"max_tokens": 128, "warmup": 1, "iterations": 5}
_ALIKE = {"n_gen": "max_tokens", "repetitions": "iterations"}
_INSTEAD = _ALIKE | {b: a for a, b in _ALIKE.items()}
"""What an option is called in the other way of measuring."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description = (
        "Measure prompt processing (pp) and token generation (tg) as llama-bench does, every "
        "length at every depth; or, given a prompt, whole generations."
    )
    options.add_model(parser)
    group = parser.add_argument_group("llama-bench's tests")
    for short, long, text in (
        ("-p", "--n-prompt", "prompt lengths, with commas; 0 for none"),
        ("-n", "--n-gen", "numbers of tokens to generate, with commas; 0 for none"),
        ("-d", "--n-depth", "numbers of tokens already in the KV cache, with commas"),
        ("-s", "--n-sequences", "numbers of sequences that generate together, with commas"),
    ):
        default = TEST_DEFAULTS[long[2:].replace("-", "_")][0]
        group.add_argument(
            short, long, type=_lengths, metavar="N,…", help=f"{text} (default: {default})"
        )
    group.add_argument(
        "-r",
        "--repetitions",
        type=argtypes.at_least(1),
        metavar="N",
        help=f"repetitions of each test (default: {TEST_DEFAULTS['repetitions']})",
    )
    prompt_options.add_prompt(parser, "--prompt", required=False)
    group = parser.add_argument_group("whole generations")
    for flag, least, text in (
        ("--max-tokens", 1, "most tokens of a generation"),
        ("--warmup", 0, "generations before those that are measured"),
        ("--iterations", 1, "generations to measure"),
    ):
        default = GENERATION_DEFAULTS[flag[2:].replace("-", "_")]
        group.add_argument(
            flag, type=argtypes.at_least(least), metavar="N", help=f"{text} (default: {default})"
        )
    parser.add_argument(
        "-o",
        "--output",
        choices=("table", "md", "json", "jsonl", "csv"),
        help="format (default: table on a terminal, else md)",
    )
    parser.add_argument(
        "--json", dest="output", action="store_const", const="json", help="the same as -o json"
    )
    options.add_engine(parser, sequences=None)
    options.add_inexact(parser)


def main(args: argparse.Namespace) -> None:
    """Run the command."""
    prompt = prompt_options.read_prompt(args)
    defaults, others = TEST_DEFAULTS, GENERATION_DEFAULTS
    if prompt is not None:
        defaults, others = others, defaults
    for name in others:
        if getattr(args, name) is not None:
            complaint = "goes with a prompt" if prompt is None else "does not go with a prompt"
            instead = f"; use --{_INSTEAD[name].replace('_', '-')}" if name in _INSTEAD else ""
            raise UsageError(f"--{name.replace('_', '-')} {complaint}{instead}")
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    rows: list[Row] = []
    try:
        if prompt is None:
            _tests(args, rows)
        else:
            _generations(args, prompt, rows)
    finally:
        if rows:  # after Ctrl-C, those that were measured until then
            _print(_TESTS if prompt is None else _GENERATIONS, rows, args.output)


Row = dict[str, Any]
Columns = dict[str, Callable[[Row], str]]
"""Of a table: heading, and how a row's cell is written."""


def _model_type(row: Row) -> str:
    """Architecture, quantisation, and of a mixture its experts."""
    experts = f", {row['n_experts']} experts, {row['n_experts_used']} used"
    return str(row["model_type"]) + (experts if row["n_experts"] else "")


_MODEL_COLUMNS: Columns = {
    "model": _model_type,
    "size": lambda r: size(r["model_size"]),
    "params": lambda r: f"{r['model_n_params'] / 1e6:,.2f} M",
    "backend": lambda r: r["backend"],
    "bits": lambda r: str(r["activation_bits"]),
    "threads": lambda r: str(r["n_threads"]),
}


_TESTS: Columns = _MODEL_COLUMNS | {
    "test": lambda r: r["test"],
    "t/s": lambda r: f"{r['avg_ts']:.2f} ± {r['stddev_ts']:.2f}",
    "median": lambda r: f"{r['median_ts']:.2f}",
    "of bandwidth": lambda r: _percent(r["fraction_of_read_bandwidth"]),
}


def _ms(name: str) -> Callable[[Row], str]:
    return lambda r: "" if r[name] is None else f"{r[name]:.2f}"


_GENERATIONS: Columns = _MODEL_COLUMNS | {
    "prompt": lambda r: str(r["prompt_tokens"]),
    "tokens": lambda r: str(r["total_tokens"]),
    "t/s": lambda r: f"{r['avg_ts']:.2f} ± {r['stddev_ts']:.2f}",
    "ttft ms": _ms("ttft_ms"),
    "p50 ms": _ms("token_ms_p50"),
    "p95 ms": _ms("token_ms_p95"),
    "p99 ms": _ms("token_ms_p99"),
    "total ms": _ms("total_time_ms"),
    "of bandwidth": lambda r: _percent(r["fraction_of_read_bandwidth"]),
}


def _print(columns: Columns, rows: list[Row], form: str | None) -> None:
    if form == "json":
        print(json.dumps(rows, indent=2))
    elif form == "jsonl":
        print("\n".join(map(json.dumps, rows)))
    elif form == "csv":
        writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows
        )
    else:
        cells = [[show(row) for show in columns.values()] for row in rows]
        print_table(list(columns), cells, form, drop=_DROP)


_DROP = ("size", "params", "threads", "bits", "model", "total ms", "p95 ms", "of bandwidth")
"""Columns that a narrow terminal does without, the first of them first."""


_WITH_DIGEST = ("json", "jsonl", "csv")
"""Formats that show the model's digest, for which its whole file is read once."""


def _tests(args: argparse.Namespace, rows: list[Row]) -> None:
    """Append a row for each test; of one that Ctrl-C ends, with the samples it has."""
    tests = bench.make_tests(args.n_prompt, args.n_gen, args.n_depth, args.n_sequences)
    most = max(t.n_sequences for t in tests)
    longest = max(bench.CHECKED + 1, *(t.length for t in tests))
    with options.open_model(args, longest, most) as model:
        about = _about(model, digest=args.output in _WITH_DIGEST) | _checked(model, most)
        with _steps(len(tests) * (args.repetitions + 1)) as step:
            for test in tests:
                now, samples = datetime.now(UTC).isoformat(timespec="seconds"), list[int]()
                try:
                    bench.measure(model, test, args.repetitions, step, samples)
                finally:
                    if samples:
                        result = bench.Result(test, samples)
                        rows.append(about | _test_row(about, result) | {"test_time": now})


def _test_row(about: Row, result: bench.Result) -> Row:
    test = result.test
    alone = test.n_gen and test.n_sequences == 1  # together they share what is read
    return {
        "test": test.name,
        "n_prompt": test.n_prompt,
        "n_gen": test.n_gen,
        "n_depth": test.n_depth,
        "n_sequences": test.n_sequences,
        "test_time": None,
        "avg_ns": result.avg_ns,
        "stddev_ns": result.stddev_ns,
        "samples_ns": result.samples_ns,
        "avg_ts": result.avg_ts,
        "stddev_ts": result.stddev_ts,
        "median_ts": result.median_ts,
        "samples_ts": result.samples_ts,
        "fraction_of_read_bandwidth": _fraction(about, result.median_ts) if alone else None,
    }


def _generations(args: argparse.Namespace, prompt: str | list[int], rows: list[Row]) -> None:
    """Append the row; after Ctrl-C, with the generations that are complete."""
    results: list[bench.Generation] = []
    with options.open_model(args, None, 1) as model:
        about = _about(model, digest=args.output in _WITH_DIGEST) | _checked(model, 1)
        try:
            with _steps(args.warmup + args.iterations) as step:
                bench.measure_generations(
                    model,
                    prompt,
                    max_tokens=args.max_tokens,
                    warmup=args.warmup,
                    iterations=args.iterations,
                    progress=step,
                    results=results,
                )
        finally:
            if results:
                rows.append(about | _generation_row(args, about, results))


def _generation_row(args: argparse.Namespace, about: Row, results: list[bench.Generation]) -> Row:
    ttft = [r.token_ns[0] / 1e6 for r in results]
    gaps = [gap / 1e6 for r in results for gap in r.gaps_ns]
    p50, p95, p99 = np.percentile(gaps, [50, 95, 99]).tolist() if gaps else [None] * 3
    rates = [len(r.token_ns) * 1e9 / r.total_ns for r in results]
    return {
        "prompt_tokens": results[0].prompt_tokens,
        "max_tokens": args.max_tokens,
        "warmup": args.warmup,
        "iterations": len(results),
        "ttft_ms": median(ttft),
        "token_ms_p50": p50,
        "token_ms_p95": p95,
        "token_ms_p99": p99,
        "total_time_ms": sum(r.total_ns for r in results) / 1e6,
        "total_tokens": sum(len(r.token_ns) for r in results),
        "samples_ttft_ms": ttft,
        "samples_total_ms": [r.total_ns / 1e6 for r in results],
        "samples_tokens": [len(r.token_ns) for r in results],
        "avg_ts": fmean(rates),
        "stddev_ts": stdev(rates) if len(rates) > 1 else 0.0,
        "median_ts": median(rates),
        "samples_ts": rates,
        "fraction_of_read_bandwidth": _fraction(about, 1e3 / p50) if p50 else None,
    }


def _checked(model: Model, sequences: int) -> Row:
    """The logits that were just held against the CPU backend; raises GateFailed."""
    compared = None
    if not model.backend.yardstick:
        with busy("checking logits against the CPU"):
            compared = bench.check_bits(model, sequences)
        say(f"{compared} logits have the CPU backend's bits")
    return {"logits_checked": compared}


def _about(model: Model, *, digest: bool) -> Row:
    """What every row says of the model and the machine; ``digest`` reads the whole file."""
    tensors, sha256 = model.file.tensors.values(), None
    if digest:
        with bar("sha256", "bytes") as step:
            sha256 = model.file.sha256(step)
    with busy("measuring the memory's bandwidth"):
        bandwidth = model.backend.read_bandwidth()
    return {
        "isobit_version": __version__,
        "numerics_version": numerics.VERSION,
        "model_filename": str(model.path),
        "model_type": f"{model.config.architecture} {bench.quantisation(model.file)}",
        "n_experts": model.config.n_experts,
        "n_experts_used": model.config.n_experts_used,
        "model_size": sum(t.nbytes for t in tensors),
        "model_n_params": sum(prod(t.shape) for t in tensors),
        "model_sha256": sha256,
        "backend": model.backend.name,
        "device": model.backend.device,
        "activation_bits": model.engine.activation_bits,
        "activation_planes": model.engine.planes,  # its former name, for a release
        "n_threads": model.engine.cores,
        "active_bytes_per_token": active_bytes(model.file, model.config),
        "read_bandwidth": bandwidth,
    }


def _fraction(about: Row, tokens_per_second: float) -> float | None:
    """The weights that decoding reads a second, of what the memory could deliver."""
    bandwidth = about["read_bandwidth"]
    if bandwidth is None:
        return None
    return float(about["active_bytes_per_token"] * tokens_per_second / bandwidth)


def _percent(fraction: float | None) -> str:
    """Nothing for a model that lies in the cache, of which memory's bandwidth says nothing."""
    return "" if fraction is None or fraction > 1 else f"{100 * fraction:.1f} %"


@contextmanager
def _steps(total: int) -> Iterator[bench.Progress]:
    """A progress bar of ``total`` runs; on Ctrl-C, says how far it got."""
    done = 0
    with progress_bar() as shown:
        task = shown.add_task("warming up", total=total)

        def step(name: str, runs: int) -> None:
            nonlocal done
            done += runs
            shown.update(task, advance=runs, description=name, refresh=True)

        try:
            yield step
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"after {done} of {total} runs") from None


def _lengths(text: str) -> list[int]:
    return argtypes.comma_list(text, "expected numbers of tokens with commas, such as 128,512")
