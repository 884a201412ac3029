"""Recording: running a model, or another source, and keeping the values of chosen stages."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from typing import Protocol, runtime_checkable

import numpy as np

from isobit import numerics
from isobit.arguments import function, instance, token_ids, wrong
from isobit.backends.base import I32
from isobit.config import ModelConfig
from isobit.errors import NothingCompared, UsageError, did_you_mean, shown
from isobit.model.graph import Graph, Key
from isobit.model.stages import (
    ON_REQUEST,
)
from isobit.runtime.model import Model
from isobit.verify.arithmetic import Array
from isobit.verify.metrics import router_margin
from isobit.verify.trace_file import MARGIN, stage_key, tensor_name, where
from isobit.verify.trace_file import Manifest as Manifest  # noqa: PLC0414
from isobit.verify.trace_file import Trace as Trace  # noqa: PLC0414 - isobit.verify.trace.Trace is in docs

CHUNK = 512

Emit = Callable[[str, int | None, I32, Array], None]
"""Receives (stage, layer, positions int32 [T], value [T, …])."""


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
        check_layers(layers, run.config.n_layers)
    chunk = run.model.engine.chunk if isinstance(run, ModelRun) else CHUNK
    every = frozenset(run.graph.names)
    wanted = every if stages is None else stages
    instance("stages", wanted, frozenset, "a frozenset of names, or None")
    for name in wanted - every:
        near = did_you_mean(str(name), every)
        raise UsageError(f"stages: expected the model's, got {shown(name)}{near}")
    recorder = TraceRecorder(wanted, layers)
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


def check_layers(layers: Collection[int] | None, n_layers: int) -> None:
    """Raises UsageError for none, and for layers that there are not: what was asked for would not
    be looked at. None is all of them."""
    if layers is not None and not (layers and all(0 <= i < n_layers for i in layers)):
        raise UsageError(f"layers: expected some of 0 to {n_layers - 1}, got {shown(layers)}")


class TraceRecorder:
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
        self._parts.setdefault(tensor_name(stage, layer), []).append(value)
        if stage == "moe_router_indices" and self._logits is not None:
            margin = router_margin(self._logits, value.shape[1]).astype(np.float32)
            self._parts.setdefault(tensor_name(MARGIN, layer), []).append(margin)
            self._logits = None

    def cut(self, keys: Sequence[Key]) -> int:
        """Keep the chunks that hold all of ``keys``; of a first one that does not, what there is.
        Returns the number of tokens."""
        whole = min((len(self._parts.get(tensor_name(*key), [])) for key in keys), default=0)
        kept = {name: parts[: max(whole, 1)] for name, parts in self._parts.items()}
        self._parts = kept
        return max((sum(map(len, parts)) for parts in kept.values()), default=0)

    def trace(self, manifest: Manifest) -> Trace:
        """Everything gathered."""
        keys = len(manifest.tokens)
        tensors = {
            name: _joined(parts, keys if stage_key(name)[0] in ON_REQUEST else 0)
            for name, parts in self._parts.items()
        }
        seen = {stage_key(name)[0] for name in tensors}
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
