"""A checkpoint of transformers written as a GGUF file, with the ``gguf`` package's writer."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from isobit.errors import NotRun, UsageError
from isobit.gguf.formats import F16, FILE_TYPES
from isobit.gguf.header import Value
from isobit.model.checkpoint import TYPES, Checkpoint
from isobit.model.weights import Weights

_FILE_TYPES = {name: number for number, name in FILE_TYPES.items()}


def convert(
    folder: str | Path,
    output: str | Path,
    kind: str = "bf16",
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the checkpoint in ``folder`` to ``output``, its matrices of type ``kind``.

    kind: one of ``TYPES``; rows that do not fill its blocks become F16. ``progress(done, total)``
    is told in bytes. The file is there once it is whole.
    Raises ModelRefused for a checkpoint that cannot be read, UsageError, NotRun without ``gguf``.
    """
    try:
        import gguf  # noqa: PLC0415 - an extra
    except ImportError:
        raise NotRun("convert: expected the gguf package; pip install '.[convert]'") from None
    folder, output = Path(folder), Path(output)
    if kind.lower() not in TYPES:
        raise UsageError(
            f"type: expected one of {', '.join(TYPES)}, got {kind!r}; other types are "
            "llama-quantize's: write bf16, then llama-quantize BF16.gguf OUT.gguf "
            f"{kind.upper()[:20]}"
        )
    fmt = TYPES[kind.lower()]
    with Checkpoint(folder, fmt, strict=False) as outline:
        Weights.from_file(outline)  # every tensor is there and has its shape
    partial = output.with_name(f".{output.name}.partial")
    with Checkpoint(folder, fmt) as file:
        writer = gguf.GGUFWriter(partial, str(file.metadata["general.architecture"]))
        writer.add_name(folder.resolve().name)
        writer.add_file_type(_FILE_TYPES[fmt.name])
        writer.add_quantization_version(2)
        for key, value in file.metadata.items():
            if key != "general.architecture":
                _add(writer, key, value)
        for name, t in file.tensors.items():
            kind_of = gguf.GGMLQuantizationType(t.format.ggml_type)
            floats = np.dtype(np.float16 if t.format is F16 else np.float32)
            writer.add_tensor_info(name, t.shape, floats, t.nbytes, kind_of)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            total, done = sum(t.nbytes for t in file.tensors.values()), 0
            for name, t in file.tensors.items():
                writer.write_tensor_data(file.data(name))
                done += t.nbytes
                if progress is not None:
                    progress(done, total)
            writer.close()
            partial.replace(output)
        except OSError as error:
            raise UsageError(f"{output}: cannot write it: {error.strerror or error}") from None
        finally:
            partial.unlink(missing_ok=True)
    return output


def _add(writer: "gguf.GGUFWriter", key: str, value: Value) -> None:  # type: ignore[name-defined] # noqa: F821
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)
