"""``isobit devices``: the backends, which of them run here, on what, and why not."""

import argparse
import json
from typing import Any

import numpy as np

from isobit.backends.hardware import processor
from isobit.cli.output import add_format, busy, print_table, size
from isobit.config import EngineConfig
from isobit.machine import total_memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    add_format(parser)


def main(args: argparse.Namespace) -> None:
    """Run the command."""
    with busy("asking the drivers"):
        found = [_reference(), _cpu(), _cuda(), _wgpu()]
        auto = _auto(found)
    if args.json:
        print(json.dumps({"backends": found, "auto": auto}))
        return
    rows = [
        [
            b["backend"],
            "yes" if b["runs"] else "no",
            b["device"] or b["reason"],
            size(b["memory"]) if b["memory"] else "",
        ]
        for b in found
    ]
    header = ["backend", "runs", "device, or why not", "memory"]
    print_table(header, rows, args.format, left=header[:3])
    for b in found:
        if b["runs"] and b["reason"]:
            print(f"\n{b['backend']}: {b['reason']}")
    print(f"\n--backend auto takes {auto}")


def _backend(
    name: str, device: str | None, reason: str = "", memory: float | None = None
) -> dict[str, Any]:
    known = None if memory is None or memory == float("inf") else int(memory)
    runs = device is not None
    return {"backend": name, "runs": runs, "device": device, "reason": reason, "memory": known}


def _reference() -> dict[str, Any]:
    return _backend("reference", f"NumPy {np.__version__}", memory=total_memory())


def _cpu() -> dict[str, Any]:
    from isobit.backends import cpu  # noqa: PLC0415 - loads what it asks about

    level = cpu.shown_level(cpu.simd_levels()[0])
    device = f"{processor()}, {level}, {EngineConfig().cores} cores"
    return _backend("cpu", device, cpu.in_the_way(), total_memory())


def _cuda() -> dict[str, Any]:
    from isobit.backends.cuda.device.gpu import CudaGpu, available  # noqa: PLC0415

    usable, reason = available()
    if not usable:
        return _backend("cuda", None, reason)
    gpu = CudaGpu()
    try:
        return _backend("cuda", gpu.name, memory=gpu.memory()[1])
    finally:
        gpu.close()


def _wgpu() -> dict[str, Any]:
    from isobit.backends.wgpu.device import gpu as device  # noqa: PLC0415

    usable, reason = device.available()
    if not usable:
        return _backend("wgpu", None, reason)
    return _backend("wgpu", device.describe(device.adapters()[0]))


def _auto(found: list[dict[str, Any]]) -> str:
    """The backend that ``--backend auto`` tries first of those that run."""
    from isobit.backends import wgpu  # noqa: PLC0415

    runs = {b["backend"] for b in found if b["runs"]}
    if "cuda" in runs:
        return "cuda"
    return "wgpu" if wgpu.available(software=False)[0] else "cpu"
