"""Checkpoints of transformers (config.json, tokenizer.json, safetensors) read as GGUF files are.

Owns the view: the same names, metadata and bytes that a GGUF file of that model has.
"""

import hashlib
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isobit.config import Metadata
from isobit.errors import ModelRefused, UsageError
from isobit.gguf.formats import BF16, F16, F32, Q4_0, Q8_0, Format, dequantize
from isobit.gguf.header import Header, TensorInfo, Value, refusal, show
from isobit.gguf.quantize import Bytes, quantize
from isobit.gguf.reader import GGUFFile
from isobit.model.architectures import HUGGING_FACE
from isobit.model.checkpoint.shards import Stored, map_shard, read_json, shard_paths
from isobit.model.checkpoint.vocabulary import vocabulary
from isobit.model.huggingface import HuggingFace, Source

__all__ = ["TYPES", "Checkpoint", "open_model"]

TYPES: dict[str, Format] = {f.name.lower(): f for f in (F32, F16, BF16, Q8_0, Q4_0)}
"""What matrices can be made on loading, by name."""

_NUMBERS = (  # that a file may write without a point
    *("rope_theta", "partial_rotary_factor", "factor", "low_freq_factor", "high_freq_factor"),
    *("beta_fast", "beta_slow", "routed_scaling_factor"),
)
_NOT_TEXT = re.compile(r"(model\.)?visual\.|mtp\.|.*\.rotary_emb\.inv_freq$")
_TEXT = re.compile(r"model\.language_model\.|language_model\.model\.")


def open_model(path: str | os.PathLike[str], *, strict: bool = True) -> GGUFFile:
    """Open a model: a GGUF file, or the folder of a checkpoint, whose matrices become q8_0 as they
    are read where ``:q8_0`` follows its name (see ``TYPES``).

    strict: see `GGUFFile.open`; of a checkpoint opened with ``strict=False``, matrices read as 0.
    Raises ModelRefused, UsageError.
    """
    path = Path(path)
    name, colon, kind = path.name.rpartition(":")
    if colon and not path.exists() and path.with_name(name or ".").is_dir():
        if kind.lower() not in TYPES:
            expected = ", ".join(TYPES)
            raise UsageError(f"{path}: type: expected one of {expected}, got {kind!r}")
        return Checkpoint(path.with_name(name), TYPES[kind.lower()], strict=strict)
    if (path / "config.json").exists():
        return Checkpoint(path, strict=strict)
    return GGUFFile.open(path, strict=strict)


class Checkpoint(GGUFFile):
    """The folder of a checkpoint as a GGUF file. Immutable once open.

    Matrices are views into the maps where they lie there as GGUF has them; others are made when
    `data` is asked for them, each time anew.
    """

    def __init__(self, folder: Path, fmt: Format | None = None, *, strict: bool = True) -> None:
        """fmt: what matrices become; None leaves them as they are. Raises ModelRefused."""
        config = _config(folder)
        kind = _kind(config)
        paths = shard_paths(folder)
        shards = [map_shard(p) for p in paths]
        self._stored = {_text_name(n): s for _, found, _ in shards for n, s in found.items()}
        self._sources: dict[str, tuple[list[Stored], Source]] = {}
        self._virtual = not strict
        self._wanted = fmt
        arch = kind.architecture
        metadata: dict[str, Value] = {"general.architecture": arch}
        metadata |= {f"{arch}.{key}": value for key, value in kind.metadata(config).items()}
        computed = kind.computed(config)
        self._stored |= {name: Stored(F32, values) for name, values in computed.items()}
        sources = kind.sources(config) | {name: (Source(name),) for name in computed}
        tensors = self._directory(folder, config, sources, kind.left_out(config))
        metadata |= vocabulary(folder, tensors["token_embd.weight"].shape[0])
        super().__init__([folder], Header(3, metadata, tensors, {}), [])
        self.called = {f"{arch}.{key}": name for key, name in kind.keys.items()} | {
            name: sources[0].name for name, sources in kind.sources(config).items()
        }
        self._contents = tuple(contents for contents, *_ in shards)
        for path, (_, _, state) in zip(paths, shards, strict=True):
            self._files[path.absolute()] = state
        self.file_size = sum(c.size for c in self._contents)

    def _directory(
        self,
        folder: Path,
        config: Metadata,
        sources: Mapping[str, Sequence[Source]],
        left_out: tuple[str, ...],
    ) -> dict[str, TensorInfo]:
        """What is there of ``sources``, and nothing but that and what is ``left_out``. What is not
        is no matter if the graph can do without."""
        tensors, taken = {}, {"lm_head.weight"} if "output.weight" not in sources else set()
        for name, possible in sources.items():
            for source in possible:
                each = range(config.count("num_experts", 1, 4096) if "{e}" in source.name else 1)
                names = [source.name.format(e=e) for e in each]
                if names[0] in self._stored:
                    break
            else:
                if not name.startswith("blk."):
                    raise self._missing(folder, names[0])
                continue
            for missing in (n for n in names if n not in self._stored):
                raise self._missing(folder, missing)
            parts = [self._stored[n] for n in names]
            taken.update(names)
            self._sources[name] = parts, source
            tensors[name] = self._info(folder, name, parts, source)
        for name in self._stored:
            known = name in taken or _NOT_TEXT.match(name) or name.startswith(left_out)
            if not known:
                expected = "only tensors of the architecture"
                raise refusal(folder, f"tensor {show(name)}", expected, "one that is not known")
        return tensors

    def _info(self, folder: Path, name: str, parts: list[Stored], source: Source) -> TensorInfo:
        first = parts[0]
        if any(p.array.shape != first.array.shape or p.format is not first.format for p in parts):
            raise refusal(folder, f"experts of {name}", "one shape and type", "several")
        empty = np.broadcast_to(np.uint8(0), first.array.shape)
        try:
            shape = source.moved(empty).shape
        except (ValueError, IndexError):
            got = list(empty.shape)
            raise refusal(folder, f"tensor {name}", "the architecture's shape", got) from None
        shape = (len(parts), *shape) if "{e}" in source.name else shape
        fmt = F32 if source.float32 or len(shape) == 1 else self._wanted or first.format
        if shape[-1] % fmt.block_size:
            fmt = F16  # as llama.cpp's converter has it
        return TensorInfo(name, shape, fmt, 0, fmt.nbytes(math.prod(shape)))

    @staticmethod
    def _missing(folder: Path, name: str) -> ModelRefused:
        return refusal(folder, f"tensor {name}", "it in the checkpoint", "none")

    def data(self, name: str) -> Bytes:
        """The bytes of tensor ``name``: uint8, 1-D; a view into the map, or made now."""
        self._mapped()  # refuses once closed
        if name not in self.tensors:
            return super().data(name)
        info, (parts, source) = self.tensors[name], self._sources[name]
        if self._virtual and not source.float32:
            return np.broadcast_to(np.uint8(0), info.nbytes)
        made = [_encoded(info.format, part, source) for part in parts]
        return made[0] if len(made) == 1 else np.concatenate(made)

    def _digest(self, progress: Callable[[int, int], None] | None) -> str:
        """Of the shards one after the other, then what else the weights depend on."""
        shards = super()._digest(progress)
        wanted = self._wanted.name if self._wanted else "as they are"
        rest = repr((shards, wanted, sorted(self.metadata.items())))
        return hashlib.sha256(rest.encode()).hexdigest()


def _encoded(fmt: Format, part: Stored, source: Source) -> Bytes:
    array: NDArray[Any] = part.array
    if fmt is part.format and not source.float32:  # rearranged at most
        return np.ascontiguousarray(source.moved(array)).reshape(-1).view(np.uint8)
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    values = source.moved(dequantize(part.format, raw, array.shape))
    return quantize(fmt, values if source.change is None else source.change.there(values))


def _config(folder: Path) -> Metadata:
    """config.json, the text model's part of it, RoPE's parameters among the others."""
    path = folder / "config.json"
    found = read_json(path)
    text = found.get("text_config")
    if isinstance(text, dict):
        found = {**text, "tie_word_embeddings": found.get("tie_word_embeddings", False) is True}
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(found.get(key), dict):
            found = {**found, **found[key]}
    if "type" in found and "rope_type" not in found:
        found["rope_type"] = found["type"]
    for key in _NUMBERS:
        if type(found.get(key)) is int:
            found[key] = float(found[key])
    for key in ("num_local_experts", "n_routed_experts"):  # the same under another name
        if key in found:
            found.setdefault("num_experts", found[key])
    return Metadata({k: v for k, v in found.items() if v is not None}, str(path))


def _kind(config: Metadata) -> HuggingFace:
    """The architecture of a checkpoint by its ``model_type``. Raises ModelRefused."""
    kind = config.text("model_type")
    known = [name for name, k in HUGGING_FACE.items() if k.checkpoint]
    if kind not in known:
        raise config.refusal("model_type", f"one of {', '.join(known)}", kind)
    return HUGGING_FACE[kind]


def _text_name(name: str) -> str:
    """The name in a checkpoint of the text model alone."""
    return _TEXT.sub("model.", name, count=1)
