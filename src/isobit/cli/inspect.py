"""``isobit inspect``: what a model file holds, for people or as JSON."""

import argparse
import json
import math
from dataclasses import is_dataclass

from isobit.cli import options, say
from isobit.cli.output import add_format, bar, print_table, size, visible
from isobit.errors import ModelRefused
from isobit.gguf.formats import FILE_TYPES
from isobit.inspect import Inspection, Verdict, inspect, verdict
from isobit.runtime.model import locate

SHOWN = 8  # elements of an array


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    options.add_model(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--tensors", action="store_true", help="list the tensors too")
    add_format(parser)
    parser.add_argument("--sha256", action="store_true", help="digest the file (reads all of it)")


def main(args: argparse.Namespace) -> None:
    """Run the command."""
    path = locate(args.model, say)
    if not args.sha256:
        found = inspect(path)
    else:
        with bar("sha256", "bytes") as step:
            found = inspect(path, sha256=True, progress=step)
    judged = verdict(found)
    if args.json:
        print(json.dumps(_report(found) | {"verdict": vars(judged)}, allow_nan=False))
    else:
        _print(found, judged, args)
    if not judged.runs:
        raise ModelRefused(judged.why)


def _report(found: Inspection) -> dict[str, object]:
    config = found.config
    return {
        "path": str(found.path),
        "files": found.files,
        "file_size": found.file_size,
        "sha256": found.sha256,
        "gguf_version": found.gguf_version,
        "parameters": found.parameters,
        "active_bytes_per_token": found.active_bytes_per_token,
        "kv_bytes_per_token": found.kv_bytes_per_token,
        "refused": found.refused,
        "backends": found.backends,
        "without_text": found.without_text,
        "config": None if config is None else {k: _json(v) for k, v in vars(config).items()},
        "types": [
            {"type": t.type, "tensors": t.tensors, "parameters": t.parameters, "bytes": t.nbytes}
            for t in found.types
        ],
        "metadata": {key: _json(value) for key, value in found.metadata.items()},
        "tensors": [
            {"name": name, "type": kind, "shape": shape, "bytes": nbytes}
            for name, kind, shape, nbytes in found.tensors
        ],
    }


def _json(value: object) -> object:
    """A metadata value as JSON: long arrays shortened, NaN and infinity as text."""
    if is_dataclass(value):
        return {k: _json(v) for k, v in vars(value).items()}
    if isinstance(value, list):
        first = [_json(v) for v in value[:SHOWN]]
        return first if len(value) <= SHOWN else {"length": len(value), "first": first}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _print(found: Inspection, judged: Verdict, args: argparse.Namespace) -> None:
    stored = sum(t.nbytes or 0 for t in found.types)
    files = f", {found.files} files" if found.files > 1 else ""
    lines = [
        f"{visible(str(found.path), 1000)}: GGUF v{found.gguf_version}{files}, "
        f"{size(found.file_size)}, "
        f"{found.parameters / 1e6:,.1f} M parameters"
    ]
    if found.sha256:
        lines.append(f"sha256 {found.sha256}")
    lines += ["", *(f"{visible(k)} = {_shown(v, k)}" for k, v in found.metadata.items()), ""]
    print("\n".join(lines))
    rows = [
        [
            t.type,
            f"{t.tensors:,}",
            f"{t.parameters:,}",
            "not implemented" if t.nbytes is None else size(t.nbytes),
            "" if t.nbytes is None else f"{100 * t.nbytes / max(stored, 1):.1f} %",
        ]
        for t in found.types
    ]
    header = ["type", "tensors", "parameters", "size", "share"]
    print_table(header, rows, args.format, drop=["parameters"])
    if args.tensors:
        print()
        shown = [
            [visible(name), kind, " × ".join(map(str, shape)), "" if n is None else size(n)]
            for name, kind, shape, n in found.tensors
        ]
        header = ["tensor", "type", "shape", "size"]
        print_table(header, shown, args.format, drop=["size"], left=["type"])
    print("\n" + "\n".join(_end(found, judged, stored)))


def _end(found: Inspection, judged: Verdict, stored: int) -> list[str]:
    """What a token costs, what is refused, and the verdict."""
    active, kv, config = found.active_bytes_per_token, found.kv_bytes_per_token, found.config
    lines = []
    if active is not None:
        share = f"{100 * active / max(stored, 1):.1f} % of {size(stored)}"
        lines.append(f"a decode step reads {active:,} bytes of weights ({share})")
    if kv is not None and config is not None:
        whole = f"{size(kv * config.context_length)} for {config.context_length:,} tokens"
        lines.append(f"the KV cache takes {kv:,} bytes per token ({whole})")
    if found.refused:
        lines += ["refused:", *(f"- {visible(line, 1000)}" for line in found.refused)]
    else:
        lines.append("refused: nothing")
        have = ", ".join(name for name, missing in found.backends.items() if missing is None)
        lines.append(f"backends that have all its kernels: {have}")
        lines += [
            f"- not {visible(missing, 1000)}" for missing in found.backends.values() if missing
        ]
    if found.without_text is not None:
        lines.append(f"no text, token ids alone: {visible(found.without_text, 1000)}")
    if not judged.runs:
        lines.append("runs here: no")
    else:
        memory = f"needs {size(judged.needs or 0)} of memory"
        memory += "" if judged.there is None else f", {size(judged.there)} are there"
        lines.append(f"runs here: yes, {judged.why}; {memory}")
    return lines


def _shown(value: object, key: str = "") -> str:
    if key == "general.file_type" and isinstance(value, int) and value in FILE_TYPES:
        return f"{value} ({FILE_TYPES[value]})"
    if isinstance(value, list):
        first = ", ".join(_shown(v) for v in value[:3])
        return f"[{first}{', …' if len(value) > 3 else ''}] ({len(value):,} elements)"
    return visible(repr(value))
