"""``isobit inspect``: what a model file holds, for people or as JSON."""

import argparse
import json
import math

from isobit.cli import options, say
from isobit.cli.output import markdown, progress_bar, size, visible
from isobit.inspect import Inspection, inspect
from isobit.runtime.model import locate

SHOWN = 8  # elements of an array
REASONS = 10  # to refuse a file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    options.add_model(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--sha256", action="store_true", help="digest the file (reads all of it)")


def main(args: argparse.Namespace) -> None:
    """Run the command."""
    path = locate(args.model, say)
    if not args.sha256:
        found = inspect(path)
    else:
        with progress_bar() as bar:
            task = bar.add_task("sha256")

            def step(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total, refresh=True)

            found = inspect(path, sha256=True, progress=step)
    print(json.dumps(_report(found), allow_nan=False) if args.json else _text(found))


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
    if isinstance(value, list):
        first = [_json(v) for v in value[:SHOWN]]
        return first if len(value) <= SHOWN else {"length": len(value), "first": first}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _text(found: Inspection) -> str:
    active, kv, config = found.active_bytes_per_token, found.kv_bytes_per_token, found.config
    stored = sum(t.nbytes or 0 for t in found.types)
    files = f", {found.files} files" if found.files > 1 else ""
    lines = [
        f"{visible(str(found.path), 1000)}: GGUF v{found.gguf_version}{files}, "
        f"{size(found.file_size)}, "
        f"{found.parameters / 1e6:,.1f} M parameters"
    ]
    if found.sha256:
        lines.append(f"sha256 {found.sha256}")
    lines += ["", *(f"{visible(k)} = {_shown(v)}" for k, v in found.metadata.items()), ""]
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
    lines += [markdown(["type", "tensors", "parameters", "size", "share"], rows), ""]
    if active is not None:
        share = f"{100 * active / max(stored, 1):.1f} % of {size(stored)}"
        lines.append(f"a decode step reads {active:,} bytes of weights ({share})")
    if kv is not None and config is not None:
        whole = f"{size(kv * config.context_length)} for {config.context_length:,} tokens"
        lines.append(f"the KV cache takes {kv:,} bytes per token ({whole})")
    if found.refused:
        lines += ["refused:", *(f"- {visible(line, 1000)}" for line in found.refused[:REASONS])]
        if (more := len(found.refused) - REASONS) > 0:
            lines.append(f"- and {more} more (--json has all)")
    else:
        lines.append("refused: nothing")
    return "\n".join(lines)


def _shown(value: object) -> str:
    if isinstance(value, list):
        first = ", ".join(_shown(v) for v in value[:3])
        return f"[{first}{', …' if len(value) > 3 else ''}] ({len(value):,} elements)"
    return visible(repr(value))
