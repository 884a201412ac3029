"""Traces: the values of chosen stages of one run, in a safetensors file that says what it is.

Tensors are called ``embedding``, ``layers.3.attn_norm``, …; their first axis is the tokens whose
positions the manifest gives. The manifest is JSON under the key ``isobit`` of the file's metadata.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from isobit import __version__, arguments, numerics
from isobit.arguments import function, instance, token_ids, whole, wrong
from isobit.backends.base import I32
from isobit.config import ModelConfig, without_planes
from isobit.errors import FileRefused, NothingCompared, UsageError, did_you_mean, shown
from isobit.files import regular
from isobit.model.graph import Graph, Key
from isobit.model.stages import (
    ATTENTION_STAGES,
    DENSE_STAGES,
    EMBEDDING,
    FINAL_STAGES,
    MOE_STAGES,
    ON_REQUEST,
    POST_FFN_RESIDUAL,
)
from isobit.runtime.model import Model
from isobit.verify.arithmetic import Array
from isobit.verify.metrics import router_margin

FORMAT = 1
CHUNK = 512
MARGIN = "moe_router_margin"
"""Recorded with moe_router_indices: ``router_margin`` of the layer's router logits."""

Emit = Callable[[str, int | None, I32, Array], None]
"""Receives (stage, layer, positions int32 [T], value [T, …])."""

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
        return json.dumps(dataclasses.asdict(self))

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
        data = without_planes(data)
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
        return _name(*key) in self._tensors

    def __getitem__(self, key: Key) -> Array:
        """The values of a stage; UsageError if they were not recorded."""
        if not isinstance(key, tuple) or len(key) != 2:
            raise wrong("stage", "its name and a layer, or None", key)
        if key[1] is not None:
            whole("layer", key[1], 0, 1 << 31)
        if key not in self:
            near = did_you_mean(shown(key[0]).strip("'"), {name for name, _ in self.stages()})
            raise UsageError(f"stage: expected one that was recorded, got {shown(key)}{near}")
        return self._tensors[_name(*key)]

    def stages(self) -> list[Key]:
        """Every (stage, layer) in graph order; margins are not stages."""
        keys = (k for k in map(_key, self._tensors) if k[0] != MARGIN)
        return sorted(keys, key=lambda k: graph_order(k, self.manifest.stages))

    def margin(self, layer: int) -> Array | None:
        """The router margins of a layer, [T]; None if they were not recorded."""
        whole("layer", layer, 0, 1 << 31)
        return self._tensors.get(_name(MARGIN, layer))

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
            if _key(name)[0] not in (*trace.manifest.stages, MARGIN):
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


def _name(stage: str, layer: int | None) -> str:
    return stage if layer is None else f"layers.{layer}.{stage}"


def _key(name: str) -> Key:
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


class ModelRun:
    """A loaded model as something that can be recorded."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.config: ModelConfig = model.config
        given = model.graph.stages.keys() - model.backend.fused_away
        self.graph: Graph = model.graph.showing(given)
        self.steps = bool(model.backend.fused_away)
        """Whether steps of decoding are other launches than a prompt's, to be looked at too."""

    def manifest(self, tokens: Sequence[int]) -> Manifest:
        """What a recording of these tokens says of itself."""
        m = self.model
        return Manifest(
            tokens=[int(t) for t in tokens],
            positions=list(range(len(tokens))),
            backend=m.backend.name,
            device=m.backend.device,
            model=m.path.name,
            model_sha256=m.file.sha256(),
            architecture=m.config.architecture,
            activation_bits=m.engine.activation_bits,
            numerics=numerics.VERSION,
            stages=list(self.graph.names),
        )

    def run(
        self,
        tokens: Sequence[int],
        chunk: int,
        stages: frozenset[str],
        emit: Emit,
        *,
        step: bool = False,
    ) -> None:
        """Run a sequence in pieces, every token's logits included; values are the caller's."""
        with self.model.new_sequence() as sequence:
            for start, stop in pieces(len(tokens), chunk, step=step):
                part = tokens[start:stop]
                positions = np.arange(start, stop, dtype=np.int32)

                def tap(stage: str, layer: int | None, value: Array, at: I32 = positions) -> None:
                    emit(stage, layer, at, np.array(value))  # backends reuse their buffers

                self.model.forward(sequence, part, range(len(part)), tap, stages)


def pieces(count: int, chunk: int, *, step: bool) -> list[tuple[int, int]]:
    """A sequence of tokens cut into passes of at most ``chunk``: first and end of each. ``step``:
    the last token is a pass of its own, as in generation."""
    last = count - 1 if step and count else count
    return [(a, b) for a, b in pairwise([*range(0, last, chunk), last, count]) if a < b]


@runtime_checkable
class Recordable(Protocol):
    """Something that runs tokens and emits every stage: a ModelRun, an Oracle, a Transformers."""

    config: ModelConfig
    graph: Graph

    def manifest(self, tokens: Sequence[int]) -> Manifest:
        """What a recording of these tokens says of itself."""

    def run(
        self,
        tokens: Sequence[int],
        chunk: int,
        stages: frozenset[str],
        emit: Emit,
        *,
        step: bool = False,
    ) -> None:
        """Run the tokens in :func:`pieces` and emit ``stages`` in graph order."""


def record(
    source: Recordable | Model,
    tokens: Sequence[int],
    stages: frozenset[str] | None = None,
    layers: range | None = None,
    *,
    interrupted: Callable[[Trace], None] = lambda _: None,
) -> Trace:
    """Run a source and keep the values of stages (default: all) in layers (default: all).

    The margin of moe_router_indices is kept with it. Changes no bit of the run. When Ctrl-C ends
    the run, ``interrupted`` is given what there is of the first tokens, if there is any. Raises
    NothingCompared for a stage that the run did not give, unless all were asked for and it is one
    of those that a backend need not hold; the manifest then says so.
    """
    run = ModelRun(source) if isinstance(source, Model) else source
    if not isinstance(run, Recordable):
        raise wrong("source", "a model", source)
    function("interrupted", interrupted)
    if layers is not None:
        instance("layers", layers, range, "a range or None")
    chunk = run.model.engine.chunk if isinstance(run, ModelRun) else CHUNK
    every = frozenset(run.graph.names)
    wanted = every if stages is None else stages
    instance("stages", wanted, frozenset, "a frozenset of names, or None")
    for name in wanted - every:
        near = did_you_mean(str(name), every)
        raise UsageError(f"stages: expected the model's, got {shown(name)}{near}")
    recorder = Recorder(wanted, layers)
    ids = check_tokens(tokens, run.config)
    needed = wanted - run.graph.on_request if wanted == every else wanted
    keys = [
        (stage, layer)
        for stage, layer in run.graph.stages
        if stage in needed and (layer is None or layers is None or layer in layers)
    ]
    step = isinstance(run, ModelRun) and run.steps
    try:
        run.run(ids, chunk, recorder.stages, recorder, step=step)
    except KeyboardInterrupt:
        if n := recorder.cut(keys):
            about = dataclasses.replace(run.manifest(ids), positions=list(range(n)))
            interrupted(recorder.trace(about))
        raise
    trace = recorder.trace(run.manifest(ids))
    for key in keys:
        held = len(trace[key]) if key in trace else 0
        if held != len(ids):
            raise NothingCompared(
                f"{where(*key)}: expected values of {len(ids)} tokens, got {held}; "
                f"{trace.manifest.backend} does not hold them, --backend reference does"
            )
    return trace


def check_tokens(tokens: Sequence[int], config: ModelConfig) -> list[int]:
    """Token ids as a list of int; raises UsageError for none and for ids that there are not."""
    ids = token_ids("tokens", tokens)
    odd = next((t for t in ids if not 0 <= t < config.vocab), None)
    if odd is not None or not ids:
        got = "none" if odd is None else shown(odd)
        raise UsageError(f"tokens: expected ids from 0 to {config.vocab - 1}, got {got}")
    return ids


class Recorder:
    """Gathers what a run emits into a trace."""

    def __init__(self, stages: frozenset[str], layers: range | None = None) -> None:
        self._wanted = stages
        self._layers = layers
        extra = {"moe_router_logits"} if "moe_router_indices" in stages else set()
        self.stages = stages | extra
        """The stages to run with."""
        self._logits: Array | None = None
        self._parts: dict[str, list[Array]] = {}

    def __call__(self, stage: str, layer: int | None, _: I32, value: Array) -> None:
        """An ``Emit``."""
        if layer is not None and self._layers is not None and layer not in self._layers:
            return
        if stage == "moe_router_logits":
            self._logits = value
        if stage not in self._wanted:
            return
        self._parts.setdefault(_name(stage, layer), []).append(value)
        if stage == "moe_router_indices" and self._logits is not None:
            margin = router_margin(self._logits, value.shape[1]).astype(np.float32)
            self._parts.setdefault(_name(MARGIN, layer), []).append(margin)
            self._logits = None

    def cut(self, keys: Sequence[Key]) -> int:
        """Keep the chunks that hold all of ``keys``; of a first one that does not, what there is.
        Returns the number of tokens."""
        whole = min((len(self._parts.get(_name(*key), [])) for key in keys), default=0)
        kept = {name: parts[: max(whole, 1)] for name, parts in self._parts.items()}
        self._parts = kept
        return max((sum(map(len, parts)) for parts in kept.values()), default=0)

    def trace(self, manifest: Manifest) -> Trace:
        """Everything gathered."""
        keys = len(manifest.tokens)
        tensors = {
            name: _joined(parts, keys if _key(name)[0] in ON_REQUEST else 0)
            for name, parts in self._parts.items()
        }
        seen = {_key(name)[0] for name in tensors}
        missing = sorted(ON_REQUEST & self._wanted - seen) if seen else []
        return Trace(dataclasses.replace(manifest, not_recorded=missing), tensors)


def _joined(parts: list[Array], keys: int) -> Array:
    """Chunks in one; attention maps [T, H, N] grow with every chunk and are filled with 0, up to
    ``keys``: none of their tokens sees what comes later."""
    width = max(keys, *(p.shape[-1] for p in parts))
    if not keys or all(p.shape[-1] == width for p in parts):
        return np.concatenate(parts)
    grown = [np.pad(p, [(0, 0)] * (p.ndim - 1) + [(0, width - p.shape[-1])]) for p in parts]
    return np.concatenate(grown)
