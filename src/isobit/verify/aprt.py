"""Importing traces of other engines from APRT folders.

A folder holds ``<stage>.bin`` for stages of the whole model and ``layer-<n>/<stage>.bin`` for those
of a layer. A file is the four bytes "APRT", the layer as u32 (2^32 - 1 for the whole model), the
number of values as u32, and the values as float32, all little-endian.
"""

import re
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from isobit.errors import FileRefused, UsageError
from isobit.model.stages import all_stages
from isobit.verify.arithmetic import Array
from isobit.verify.trace import Manifest, Recorder, Trace, graph_order

_WHOLE = 0xFFFFFFFF
_WHOLE_STAGES = ("embedding", "final_norm", "lm_head")
_LAYER = re.compile(r"layer-(\d{1,5})")
_STAGES = frozenset(all_stages(moe=True)) | frozenset(all_stages(moe=False))


def read_folder(
    folder: str | Path, tokens: Sequence[int], *, last: bool = False, engine: str = "imported"
) -> Trace:
    """Read a folder that was recorded for ``tokens``.

    last: the files hold the last token alone, not all of them. Files say no shapes: values become
    [T, n]. Raises FileRefused naming the file, and UsageError if there is none.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileRefused(f"{root}: expected a folder with <stage>.bin and layer-<n>/<stage>.bin")
    positions = [len(tokens) - 1] if last else list(range(len(tokens)))
    found: list[tuple[str, int | None, Path]] = []
    for path in sorted(root.rglob("*.bin")):
        found.append((*_place(path, root), path))
    if not found:
        raise UsageError(f"{root}: expected <stage>.bin and layer-<n>/<stage>.bin, found none")
    recorder = Recorder(frozenset(stage for stage, _, _ in found))
    at = np.array(positions, np.int32)
    for stage, layer, path in sorted(found, key=lambda f: graph_order(f[:2])):
        recorder(stage, layer, at, _read(path, stage, layer, len(positions)))
    manifest = Manifest(tokens=list(tokens), positions=positions, backend=engine)
    return recorder.trace(manifest)


def _place(path: Path, root: Path) -> tuple[str, int | None]:
    stage, parts = path.stem, path.relative_to(root).parts
    if stage not in _STAGES:
        raise FileRefused(f"{path}: expected one of {', '.join(sorted(_STAGES))}; got {stage!r}")
    match = _LAYER.fullmatch(parts[0]) if len(parts) == 2 else None
    if (len(parts) == 1) == (stage in _WHOLE_STAGES) and (len(parts) == 1 or match):
        return stage, int(match[1]) if match else None
    raise FileRefused(f"{path}: expected {stage}.bin in {_home(stage)}")


def _home(stage: str) -> str:
    return "the folder itself" if stage in _WHOLE_STAGES else "a folder layer-<n>"


def _read(path: Path, stage: str, layer: int | None, tokens: int) -> Array:
    if not path.is_file():  # a pipe or a device might never end
        raise FileRefused(f"{path}: expected a file, got something else")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(12)
            if header[:4] != b"APRT" or len(header) < 12:
                raise FileRefused(f"{path}: expected b'APRT' and 8 bytes more, got {header!r}")
            said_layer, count = struct.unpack("<II", header[4:])
            if said_layer != (_WHOLE if layer is None else layer):
                raise FileRefused(f"{path}: expected layer {layer}, the file says {said_layer}")
            if size != 12 + 4 * count:
                raise FileRefused(f"{path}: expected {12 + 4 * count} bytes, got {size}")
            if count == 0 or count % tokens:
                raise FileRefused(
                    f"{path}: expected a multiple of {tokens} values, one row a token, got "
                    f"{count}; is it the last token alone, or of other tokens?"
                )
            values = np.fromfile(file, "<f4", count).astype(np.float32).reshape(tokens, -1)
    except OSError as error:
        raise FileRefused(f"{path}: expected a readable file, got: {error.strerror}") from None
    if stage != "moe_router_indices":
        return values
    ids = np.where(np.abs(values) < 1 << 24, values, -1).astype(np.int32)
    if (ids != values).any() or (ids < 0).any():
        raise FileRefused(f"{path}: expected expert numbers, got other values")
    return ids
