"""What a model file holds: sizes, the cost of a token, and what would be refused.

Reads the header and the norm vectors alone, so an 18 GB file takes as long as a small one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from isobit.config import ModelConfig
from isobit.errors import ModelRefused
from isobit.gguf.reader import GGUFFile
from isobit.model.architectures import read_config
from isobit.model.checkpoint import open_model
from isobit.model.weights import Weights
from isobit.text.tokenizer import Tokenizer


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
    """What a position takes in the KV cache."""
    refused: list[str]
    """Why the model would not run, one line each; empty if it would."""
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
        config, refused = _refusals(file)
        digest = file.sha256(progress) if sha256 else None
        return Inspection(
            path=file.path,
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
            kv_bytes_per_token=kv_bytes(config) if config else None,
            refused=refused,
            sha256=digest,
        )


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


def kv_bytes(config: ModelConfig) -> int:
    """Bytes of one position in the KV cache: of each key and value head vector, head_dim 16-bit
    integers and a float32 scale (docs/numerics.md, section 6)."""
    return config.n_layers * config.n_kv_heads * 2 * (2 * config.head_dim + 4)


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


def _refusals(file: GGUFFile) -> tuple[ModelConfig | None, list[str]]:
    """The hyper-parameters, and each reason why loading the file would fail."""
    lines = [
        f"{file.path}: tensor {name}: type {tensor.type_name} is not implemented"
        for name, tensor in file.refused.items()
    ]
    config = None
    embedding = file.tensors.get("token_embd.weight") or file.refused.get("token_embd.weight")
    try:
        if embedding is not None:
            vocab = embedding.shape[0]
            config = read_config(file.metadata, vocab=vocab, source=str(file.path))
        if not file.refused:  # else the tensors refused above would be called missing
            Weights.from_file(file)
    except ModelRefused as error:
        lines.append(str(error))
    try:
        Tokenizer.from_metadata(file.metadata, str(file.path))
    except ModelRefused as error:
        lines.append(str(error))
    return config, lines
