"""Why a path that was given for a model holds none, and the way on from there.

People give what they have: a name of the hub, a folder as transformers saves it, a checkpoint of
another program. None of it is read here beyond its first bytes.
"""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from isobit.errors import ModelRefused, no_such_file, printable

_CONVERT = "convert_hf_to_gguf.py, which comes with llama.cpp, makes a GGUF file of it"
_BEGINNINGS = {
    b"PK\x03\x04": f"a PyTorch checkpoint; of a Hugging Face model folder {_CONVERT}",
    b"vers": "a Git LFS pointer instead of the file; git lfs pull fetches it",
    b"<!DO": "a web page instead of the file",
    b"<htm": "a web page instead of the file",
    b"ggml": "a GGML file, older than GGUF; take a newer one of the model",
    b"ggjt": "a GGML file, older than GGUF; take a newer one of the model",
}


def explain(path: Path) -> ModelRefused | None:
    """The refusal of a path that is no GGUF file at all; None for one that may be."""
    try:
        line = _explain(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        line = f"{path}: expected a file that can be read, got: {reason}"
    if line is None:
        return None
    return ModelRefused(printable(line))


def _explain(path: Path) -> str | None:
    if path.is_dir():
        return f"{path}: expected a GGUF file, got {_folder(path)}"
    if not path.exists():
        return _missing(path)
    if not path.is_file():  # opening a pipe would wait for its writer
        return f"{path}: expected a regular file, got something else"
    with path.open("rb") as file:
        first = file.read(9)
    if first[:4] != b"GGUF" and first[8:9] == b"{":
        home = f"give its folder, which is read as it is if it can be; else {_CONVERT}"
        return f"{path}: expected a GGUF file, got safetensors; {home}"
    found = _BEGINNINGS.get(first[:4])
    return found and f"{path}: expected a GGUF file, got {found}"


def _folder(path: Path) -> str:
    names = sorted(p.name for p in path.iterdir())
    if files := [n for n in names if n.endswith(".gguf")]:
        return f"a folder; the GGUF files in it: {', '.join(files[:5])}"
    if any(n.endswith(".safetensors") for n in names):
        return "a folder of safetensors without the config.json that says what they are"
    return "a folder without GGUF files"


def _missing(path: Path) -> str:
    """A name that the hub or Ollama would know, or a misspelt one."""
    text = re.sub("^(hf|https?):/+", r"\1://", str(path))  # a Path keeps one slash of the two
    link = re.fullmatch(r"(hf:|ollama:|https?:)/*(huggingface\.co/)?(.+)", text)
    name = link[3] if link else text
    tagged = re.fullmatch(r"[\w.-]+:[\w.-]+", text) and "." not in text.partition(":")[0]
    if link[1] == "hf:" or link[2] if link else re.fullmatch(r"[\w.-]+/[\w.-]+-GGUF", text):
        return f"no such file: {text!r}; a model of the Hugging Face hub is hf://{name}"
    if link[1] == "ollama:" if link else tagged:
        return f"no such file: {text!r}; a model that Ollama has pulled is ollama://{name}"
    if link:
        return f"no such file: {text!r}; download it first"
    if str(path) == "sample":  # as a Path, or ./sample
        return "no such file: 'sample'; the model that comes with isobit is the bare text sample"
    return no_such_file(path, "sample")


OTHER_TYPES = "take the model's Q4_K_M file, or llama-quantize --allow-requantize IN OUT Q4_K_M"
"""What to do about tensor types that are not implemented."""


def not_readable(types: Iterable[str]) -> str:
    """Tensor types that are not implemented, how often each occurs, and what to do."""
    counts = ", ".join(f"{name} ({n} tensors)" for name, n in Counter(types).most_common())
    return f"{counts.replace('(1 tensors', '(1 tensor')}; {OTHER_TYPES}"
