"""What a model file holds: sizes, the cost of a token, and what would be refused.

Reads the header and the norm vectors alone, so an 18 GB file takes as long as a small one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from isobit.backend_names import BACKENDS
from isobit.backends import lacks
from isobit.backends.base.kv_pages import page_bytes
from isobit.backends.hardware import may_have_gpu
from isobit.config import EngineConfig, ModelConfig
from isobit.errors import ModelRefused
from isobit.gguf.not_gguf import OTHER_TYPES
from isobit.gguf.reader import GGUFFile
from isobit.machine import total_memory
from isobit.model.architectures import read_config
from isobit.model.checkpoint import open_model
from isobit.model.weights import Weights
from isobit.numerics import KV_PAGE
from isobit.text.tokenizer import Tokenizer

_SHORTEST = 4096
"""A context for which a GPU must have room to be worth it."""


@dataclass(frozen=True)
class TypeTotal:
    """The tensors of one type. ``nbytes`` is None for a type that is not implemented."""

    type: str
    tensors: int
    parameters: int
    nbytes: int | None


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect` found."""

    path: Path
    located: Path
    """What opens the same model again: of a folder read in another type, with that type."""
    files: int
    """How many files it is in; a split model has more than one."""
    file_size: int
    """Of all of them, bytes."""
    gguf_version: int
    metadata: dict[str, object]
    types: list[TypeTotal]
    """Largest first."""
    tensors: list[tuple[str, str, tuple[int, ...], int | None]]
    """Name, type, shape (slowest dimension first), bytes (None: type not implemented)."""
    config: ModelConfig | None
    """None if the hyper-parameters are refused."""
    active_bytes_per_token: int | None
    """Weights that one decode step reads, in bytes; None if the model is refused."""
    kv_bytes_per_token: int | None
    """What a position takes in the KV cache; None if the model is refused."""
    refused: list[str]
    """Why the model would not run, one line each; empty if it would."""
    backends: dict[str, str | None]
    """What each backend has no kernel for, None if it has all; empty if the model is refused."""
    without_text: str | None
    """Why it would run from token ids alone; None if its tokenizer is known."""
    sha256: str | None

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(t.parameters for t in self.types)


def inspect(
    path: str | Path, *, sha256: bool = False, progress: Callable[[int, int], None] | None = None
) -> Inspection:
    """Look into a GGUF file without loading it.

    sha256: also digest the whole file, of a split model all its parts in order;
    ``progress(done, total)`` is told how far it is in bytes.
    Raises ModelRefused only if the header itself cannot be read.
    """
    with open_model(path, strict=False) as file:
        config, refused, weights = _refusals(file)
        digest = file.sha256(progress) if sha256 else None
        return Inspection(
            path=file.path,
            located=Path(path),
            files=len(file.paths),
            file_size=file.file_size,
            gguf_version=file.version,
            metadata=dict(file.metadata),
            types=_totals(file),
            tensors=[
                *((t.name, t.format.name, t.shape, t.nbytes) for t in file.tensors.values()),
                *((r.name, r.type_name, r.shape, None) for r in file.refused.values()),
            ],
            config=config,
            active_bytes_per_token=None if refused or not config else active_bytes(file, config),
            kv_bytes_per_token=page_bytes(weights) // KV_PAGE if weights else None,
            refused=refused,
            backends={n: lacks(n, weights) for n in BACKENDS} if weights and not refused else {},
            without_text=_tokenizer_refused(file),
            sha256=digest,
        )


@dataclass(frozen=True)
class Verdict:
    """Whether a file runs on this machine, and what it takes."""

    runs: bool
    why: str
    """A sentence without its beginning: what is in the way, or where it runs."""
    backend: str | None
    needs: int | None
    """Bytes of memory on that backend, for one sequence of the model's own context."""
    there: int | None
    """Bytes that the machine or the device has; None where nobody says."""
    context: int | None
    """The longest sequence for which there is room."""


def verdict(found: Inspection) -> Verdict:
    """Judge a file for this machine: the GPU if there is one that CUDA reaches, else the CPU."""
    config, kv = found.config, found.kv_bytes_per_token
    if found.refused or config is None or kv is None:
        why = found.refused[0] if found.refused else f"{found.path}: it holds no model"
        return Verdict(False, why, None, None, None, None)
    weights = sum(t.nbytes or 0 for t in found.types)
    gpu = None
    if found.backends["cuda"] is None:
        gpu = _on_gpu(found.located, weights, kv, config.context_length)
    if gpu is not None and gpu.runs:
        return gpu
    instead = "" if gpu is None else f"on the CPU, as the GPU is too small ({gpu.why}); "
    memory = total_memory()
    needs = weights + kv * config.context_length
    there = None if math.isinf(memory) else int(memory)
    room = config.context_length if there is None else max(0, there - weights) // kv
    context = min(config.context_length, room // KV_PAGE * KV_PAGE if room else 0)
    if there is not None and weights >= there:
        why = "slowly: its weights do not fit the memory and are read from disk again and again"
    elif context < config.context_length:
        why = f"with --context {context}: for more, the KV cache does not fit the memory"
    else:
        why = "on the CPU"
    return Verdict(True, instead + why, "cpu", needs, there, context)


def _on_gpu(path: Path, weights: int, kv: int, wanted: int) -> Verdict | None:
    """The verdict of CUDA's own plan; None where there is no such device."""
    if not may_have_gpu():
        return None
    from isobit.backends.cuda.device import driver, gpu  # noqa: PLC0415 - loads the driver
    from isobit.backends.cuda.steps.programs import planned  # noqa: PLC0415

    if not driver.available()[0]:
        return None
    device = gpu.CudaGpu()
    try:
        free, _ = device.memory()
        with open_model(path) as file:
            plan = planned(Weights.from_file(file), EngineConfig(max_sequences=1), device)
    finally:
        device.close()
    room = (
        max(0, free - plan.total + plan.cache) * wanted // max(plan.cache, 1) // KV_PAGE * KV_PAGE
    )
    context = min(wanted, room)
    if plan.total <= free:
        return Verdict(True, f"on {device.name}", "cuda", plan.total, free, context)
    if context >= _SHORTEST:
        why = f"on {device.name}, with --context {context}: for more, the KV cache does not fit"
        return Verdict(True, why, "cuda", plan.total, free, context)
    need = f"{(weights + kv * _SHORTEST) / 1e9:.1f} GB and more of {free / 1e9:.1f} GB"
    return Verdict(False, need, "cuda", plan.total, free, None)


def active_bytes(file: GGUFFile, config: ModelConfig) -> int:
    """Bytes of weights that one decode step reads: of a layer's experts those that are chosen, of
    the token embedding one row, everything else once. Activations and KV cache are not counted.
    """
    total = 0
    tied = "output.weight" not in file.tensors
    for name, tensor in file.tensors.items():
        if name.endswith("_exps.weight"):
            total += tensor.nbytes // config.n_experts * config.n_experts_used
        elif name == "token_embd.weight":
            total += tensor.nbytes // config.vocab + (tensor.nbytes if tied else 0)
        else:
            total += tensor.nbytes
    return total


def _totals(file: GGUFFile) -> list[TypeTotal]:
    groups: dict[str, list[tuple[int, int | None]]] = {}
    for t in file.tensors.values():
        groups.setdefault(t.format.name, []).append((math.prod(t.shape), t.nbytes))
    for r in file.refused.values():
        groups.setdefault(r.type_name, []).append((math.prod(r.shape), None))
    totals = [
        TypeTotal(
            type=name,
            tensors=len(sizes),
            parameters=sum(n for n, _ in sizes),
            nbytes=None if sizes[0][1] is None else sum(b or 0 for _, b in sizes),
        )
        for name, sizes in groups.items()
    ]
    return sorted(totals, key=lambda t: (t.nbytes is None, -(t.nbytes or 0)))


def _refusals(file: GGUFFile) -> tuple[ModelConfig | None, list[str], Weights | None]:
    """The hyper-parameters, each reason why loading the file would fail, and else the model."""
    lines, weights = [], None
    for kind in dict.fromkeys(t.type_name for t in file.refused.values()):
        names = [name for name, t in file.refused.items() if t.type_name == kind]
        more = f" and of {len(names) - 1:,} more" if len(names) > 1 else ""
        what = f"tensor {names[0]}: its type{more}, {kind}, is not implemented"
        lines.append(f"{file.path}: {what}; {OTHER_TYPES}")
    config = None
    embedding = file.tensors.get("token_embd.weight") or file.refused.get("token_embd.weight")
    try:
        if embedding is not None:
            vocab = embedding.shape[0]
            config = read_config(file.metadata, vocab=vocab, source=str(file.path))
        if not file.refused:  # else the tensors refused above would be called missing
            weights = Weights.from_file(file)
    except ModelRefused as error:
        lines.append(str(error))
    return config, lines, weights


def _tokenizer_refused(file: GGUFFile) -> str | None:
    try:
        Tokenizer.from_metadata(file.metadata, str(file.path))
    except ModelRefused as error:
        return str(error)
    return None
