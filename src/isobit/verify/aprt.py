"""Importing traces of other engines from APRT folders.

A folder holds ``<stage>.bin`` for stages of the whole model and ``layer-<n>/<stage>.bin`` for those
of a layer. A file is the four bytes "APRT", the layer as u32 (2^32 - 1 for the whole model), the
number of values as u32, and the values as float32, all little-endian. paiml/aprender, where the
format comes from, keeps the embedding in layer 0.
"""

import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from isobit.errors import FileRefused, UsageError
from isobit.model.graph import Graph, Key
from isobit.model.stages import EMBEDDING, FINAL_STAGES
from isobit.verify.arithmetic import Array
from isobit.verify.forward import shaped
from isobit.verify.trace import TraceRecorder
from isobit.verify.trace_file import Manifest, Trace, graph_order, where

_WHOLE = 0xFFFFFFFF
_WHOLE_STAGES = (EMBEDDING, *FINAL_STAGES)
_LAYER = re.compile(r"layer-(\d{1,5})")
_STAGES = tuple(Manifest(tokens=[], positions=[], backend="").stages)
_SPELLINGS = {"ffn_swigl": "ffn_swiglu"}
_OF_OTHER_GRAPHS = frozenset({"qkv_bias", "ffn_silu"})


def read_folder(
    folder: str | Path,
    tokens: Sequence[int],
    *,
    last: bool = False,
    engine: str = "imported",
    graph: Graph | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> Trace:
    """Read a folder that was recorded for ``tokens``.

    last: the files hold the last token alone, not all of them. Files say no shapes: values become
    [T, n], or, with the ``graph`` of a model, what it says of a stage; without one, stages are
    Qwen3's. ``note`` is told of stages that the other engine has and this graph has not, which
    are left out. Raises FileRefused naming the file, and UsageError if there is none.
    """
    if not tokens:
        raise UsageError("tokens: expected at least one, got none")
    root = Path(folder)
    if not root.is_dir():
        raise FileRefused(f"{root}: expected a folder with <stage>.bin and layer-<n>/<stage>.bin")
    names = _STAGES if graph is None else graph.names
    whole = _WHOLE_STAGES if graph is None else [s for s, layer in graph.stages if layer is None]
    positions = [len(tokens) - 1] if last else list(range(len(tokens)))
    found: dict[Key, tuple[Path, int | None]] = {}
    paths = sorted(root.rglob("*.bin"))
    for path in paths:
        if path.stem not in _OF_OTHER_GRAPHS:
            stage, layer = _place(path, root, names, whole)
            key = (stage, None if stage == EMBEDDING else layer)
            if key in found:
                raise FileRefused(f"{path}: expected {where(*key)} once, got {found[key][0]} too")
            found[key] = path, layer
    if not found:
        raise UsageError(f"{root}: expected <stage>.bin and layer-<n>/<stage>.bin, found none")
    if left := sorted({path.stem for path in paths} & _OF_OTHER_GRAPHS):
        note(f"{root}: left out {' and '.join(left)}, which the model has not")
    recorder = TraceRecorder(frozenset(stage for stage, _ in found))
    at = np.array(positions, np.int32)
    for key in sorted(found, key=lambda key: graph_order(key, names)):
        value = _read(*found[key], key[0], len(positions))
        if graph is not None:
            try:
                value = shaped(graph, *key, value)
            except FileRefused as error:
                hint = " and of the last token alone" if last else ""
                raise FileRefused(f"{found[key][0]}: {error}{hint}") from None
        recorder(*key, at, value)
    about = Manifest(tokens=list(tokens), positions=positions, backend=engine, stages=[*names])
    return recorder.trace(about)


def _place(path: Path, root: Path, names: Sequence[str], whole: Sequence[str]) -> Key:
    """A file's stage and the layer whose folder it lies in; ``whole``: stages of no layer."""
    stage, parts = _SPELLINGS.get(path.stem, path.stem), path.relative_to(root).parts
    if stage not in names:
        raise FileRefused(f"{path}: expected one of {', '.join(sorted(names))}; got {stage!r}")
    match = _LAYER.fullmatch(parts[0]) if len(parts) == 2 else None
    layer = int(match[1]) if match else None
    alone = stage in whole
    if (alone and len(parts) == 1) or (match and (not alone or (stage, layer) == (EMBEDDING, 0))):
        return stage, layer
    home = "the folder itself" if alone else "a folder layer-<n>"
    raise FileRefused(f"{path}: expected {stage}.bin in {home}")


def _read(path: Path, layer: int | None, stage: str, tokens: int) -> Array:
    if not path.is_file():  # a pipe or a device might never end
        raise FileRefused(f"{path}: expected a file, got something else")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(12)
            if header[:4] != b"APRT" or len(header) < 12:
                raise FileRefused(f"{path}: expected b'APRT' and 8 bytes more, got {header!r}")
            said_layer, count = struct.unpack("<II", header[4:])
            expected = _WHOLE if layer is None else layer
            if said_layer != expected:
                raise FileRefused(f"{path}: expected layer {expected}, the file says {said_layer}")
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
