"""Trace files: the values of chosen stages of one run, in safetensors that say what they are.

Tensors are called ``embedding``, ``layers.3.attn_norm``, …; their first axis is the tokens whose
positions the manifest gives. The manifest is JSON under the key ``isobit`` of the file's metadata.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from isobit import __version__, arguments
from isobit.arguments import whole, wrong
from isobit.config import with_planes, without_planes
from isobit.errors import FileRefused, UsageError, did_you_mean, shown
from isobit.files import regular
from isobit.model.graph import Key
from isobit.model.stages import (
    ATTENTION_STAGES,
    DENSE_STAGES,
    EMBEDDING,
    FINAL_STAGES,
    MOE_STAGES,
    ON_REQUEST,
    POST_FFN_RESIDUAL,
)
from isobit.verify.arithmetic import Array

FORMAT = 1


MARGIN = "moe_router_margin"
"""Recorded with moe_router_indices: ``router_margin`` of the layer's router logits."""


_QWEN3 = (
    EMBEDDING,
    *ATTENTION_STAGES,
    *DENSE_STAGES,
    *MOE_STAGES,
    POST_FFN_RESIDUAL,
    *FINAL_STAGES,
)
"""The stages, in graph order, of traces that do not say theirs: those recorded before there were
other models, and those of other engines."""


@dataclass(frozen=True)
class Manifest:
    """What was recorded, of what."""

    tokens: list[int]
    positions: list[int]
    """The tokens that were recorded: all of them, or e.g. the last alone."""
    backend: str
    device: str = ""
    model: str = ""
    model_sha256: str | None = None
    architecture: str = ""
    activation_bits: int | None = None
    numerics: int | None = None
    """None for a run that does not follow docs/numerics.md (another engine, the oracle)."""
    not_recorded: list[str] = dataclasses.field(default_factory=list)
    """Stages that were asked for but that the backend does not hold."""
    stages: list[str] = dataclasses.field(default_factory=lambda: list(_QWEN3))
    """The names of the model's stages, in graph order."""
    isobit: str = __version__
    format: int = FORMAT

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps(with_planes(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, text: str, source: str) -> "Manifest":
        """Read and check; raises FileRefused."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            raise FileRefused(
                f"{source}: expected a manifest in JSON, got something else"
            ) from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise FileRefused(
                f"{source}: expected a trace of format {FORMAT}; record it again with this version"
            )
        data = without_planes(data, source)
        data.setdefault("stages", list(_QWEN3))
        for f in dataclasses.fields(cls):
            if f.name not in data or not _is(f.name, data[f.name]):
                raise FileRefused(f"{source}: manifest: {f.name} is missing or malformed")
        positions = data["positions"]
        if positions != sorted(set(positions)) or positions[-1:] >= [len(data["tokens"])]:
            raise FileRefused(f"{source}: manifest: expected positions of tokens, ascending")
        return cls(**{f.name: data[f.name] for f in dataclasses.fields(cls)})


def _is(name: str, value: Any) -> bool:
    if name in ("tokens", "positions"):
        return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 31 for v in value)
    if name == "stages":
        return isinstance(value, list) and set(map(type, value)) <= {str}
    if name == "not_recorded":
        return isinstance(value, list) and set(map(str, value)) <= ON_REQUEST
    if name == "activation_bits":
        return value in (None, 8, 16)
    if name in ("numerics", "format"):
        return value is None or type(value) is int
    return isinstance(value, str) or (name == "model_sha256" and value is None)


class Trace:
    """A manifest and tensors by (stage, layer)."""

    def __init__(self, manifest: Manifest, tensors: Mapping[str, Array]) -> None:
        self.manifest = manifest
        self._tensors = tensors

    def __contains__(self, key: Key) -> bool:
        return tensor_name(*key) in self._tensors

    def __getitem__(self, key: Key) -> Array:
        """The values of a stage; UsageError if they were not recorded."""
        if not isinstance(key, tuple) or len(key) != 2:
            raise wrong("stage", "its name and a layer, or None", key)
        if key[1] is not None:
            whole("layer", key[1], 0, 1 << 31)
        if key not in self:
            near = did_you_mean(shown(key[0]).strip("'"), {name for name, _ in self.stages()})
            raise UsageError(f"stage: expected one that was recorded, got {shown(key)}{near}")
        return self._tensors[tensor_name(*key)]

    def stages(self) -> list[Key]:
        """Every (stage, layer) in graph order; margins are not stages."""
        keys = (k for k in map(stage_key, self._tensors) if k[0] != MARGIN)
        return sorted(keys, key=lambda k: graph_order(k, self.manifest.stages))

    def margin(self, layer: int) -> Array | None:
        """The router margins of a layer, [T]; None if they were not recorded."""
        whole("layer", layer, 0, 1 << 31)
        return self._tensors.get(tensor_name(MARGIN, layer))

    def save(self, path: str | Path) -> None:
        """Write the file; an existing one is replaced."""
        save_tensors(path, "the trace", self._tensors, {"isobit": self.manifest.to_json()})

    @classmethod
    def load(cls, path: str | Path) -> "Trace":
        """Open a file; tensors are read when they are asked for. Raises FileRefused."""
        try:
            file: Any = safe_open(str(regular(path, "a trace")), framework="numpy")
        except (OSError, SafetensorError) as error:
            raise FileRefused(f"{path}: expected a trace, got: {error}") from None
        text = (file.metadata() or {}).get("isobit")
        if text is None:
            raise FileRefused(f"{path}: expected a trace, got a safetensors file of another kind")
        trace = cls(Manifest.from_json(text, str(path)), _Lazy(file, str(path)))
        for name in trace._tensors:
            key = stage_key(name)
            if key[0] not in (*trace.manifest.stages, MARGIN) or tensor_name(*key) != name:
                raise FileRefused(f"{path}: expected the stages of a trace, got a tensor {name!r}")
        return trace


class _Lazy(Mapping[str, Array]):
    """The tensors of an open file."""

    def __init__(self, file: Any, source: str) -> None:
        self._file = file
        self._source = source
        self._names = dict.fromkeys(file.keys())

    def __getitem__(self, name: str) -> Array:
        if name not in self._names:
            raise KeyError(name)
        try:
            value: Array = self._file.get_tensor(name)
        except (TypeError, AttributeError, SafetensorError) as error:
            raise FileRefused(f"{self._source}: tensor {name}: {error}") from None
        if value.dtype not in (np.float32, np.float64, np.int32):
            raise FileRefused(
                f"{self._source}: tensor {name}: expected F32, F64 or I32, got {value.dtype}"
            )
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def save_tensors(
    path: str | Path,
    what: str,
    tensors: Mapping[str, Array],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write a safetensors file; an existing one is replaced. Raises UsageError.

    The library writes a file beside it that its owner alone may read, and renames it, even over a
    device: so the place is looked at first, and the file gets the usual permissions.
    """
    file = Path(arguments.path("path", path))
    if file.exists() and not file.is_file():
        raise UsageError(f"{path}: cannot write {what}: expected a file, got something else")
    try:
        file.touch()
        mode = file.stat().st_mode
        save_file({n: np.ascontiguousarray(a) for n, a in tensors.items()}, str(path), metadata)
        file.chmod(mode)
    except (OSError, ValueError, SafetensorError) as error:
        raise UsageError(f"{path}: cannot write {what}: {error}") from None


def tensor_name(stage: str, layer: int | None) -> str:
    """What a stage's tensor is called."""
    return stage if layer is None else f"layers.{layer}.{stage}"


def stage_key(name: str) -> Key:
    """The stage that a tensor's name means."""
    head, _, rest = name.partition(".")
    number, _, stage = rest.partition(".")
    if head == "layers" and number.isascii() and number.isdigit() and len(number) < 6:
        return stage, int(number)
    return name, None


def graph_order(key: Key, names: Sequence[str] = _QWEN3) -> tuple[int, int]:
    """Sorts (stage, layer) in graph order, the names of the stages being in that order."""
    stage, layer = key
    place = names.index(stage)
    if layer is None:
        return (-1 if stage == "embedding" else 1 << 20, place)
    return (layer, place)


def where(stage: str, layer: int | None) -> str:
    """A stage's place in words."""
    return stage if layer is None else f"{stage} of layer {layer}"


def parse_stages(text: str, valid: Sequence[str]) -> frozenset[str]:
    """Stage names separated by commas, or "all"; raises UsageError with the valid names."""
    names = [n.strip() for n in text.split(",")]
    for name in names:
        if name not in (*valid, "all"):
            near = did_you_mean(name, valid) or f"; expected all or some of {', '.join(valid)}"
            raise UsageError(f"stages: no such stage: {name!r}{near}")
    return frozenset(valid) if "all" in names else frozenset(names)


def parse_layers(text: str, n_layers: int) -> range:
    """``A..B`` (both included), ``A`` or "all"; raises UsageError."""
    if text == "all":
        return range(n_layers)
    first, dots, last = text.partition("..")
    if not dots:
        last = first
    if first.isdecimal() and last.isdecimal() and int(first) <= int(last) < n_layers:
        return range(int(first), int(last) + 1)
    raise UsageError(f"layers: expected A..B within 0..{n_layers - 1}, or all; got {text!r}")
