"""tokenizer.json in the words of GGUF: byte-level BPE of the models that can be read."""

from pathlib import Path
from typing import Any

from isobit.gguf.header import Value, refusal, show
from isobit.model.checkpoint.shards import read_json

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # tokenizer.ggml.token_type

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS = {_QWEN2: "qwen2", _QWEN35: "qwen35"}


def vocabulary(folder: Path, size: int) -> dict[str, Value]:
    """The tokenizer's metadata, of a vocabulary of ``size`` entries; {} for a folder without one.

    Raises ModelRefused for a tokenizer that is not known.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        return {}
    found = read_json(path)
    try:
        tokens, types = _tokens(path, found, size)
        merges: list[Value] = [_merge(m) for m in found["model"]["merges"]]
        pattern = _pattern(found["pre_tokenizer"])
        kind = found["model"]["type"]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        raise refusal(path, "tokenizer", "byte-level BPE", "something else") from None
    if kind != "BPE" or pattern not in _PRE_TOKENIZERS:
        known = ", ".join(_PRE_TOKENIZERS.values())
        got = f"{show(str(kind))} with another pattern"
        raise refusal(path, "tokenizer", f"byte-level BPE with the pattern of {known}", got)
    metadata: dict[str, Value] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _PRE_TOKENIZERS[pattern],
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
    }
    return metadata | _special(folder, tokens)


def _tokens(path: Path, found: dict[str, Any], size: int) -> tuple[list[Value], list[Value]]:
    tokens: list[Value] = [f"[PAD{i}]" for i in range(size)]
    types: list[Value] = [_UNUSED] * size
    entries = [(str(text), i, _NORMAL) for text, i in found["model"]["vocab"].items()]
    for token in found.get("added_tokens") or []:
        kind = _CONTROL if token["special"] else _USER_DEFINED
        entries.append((str(token["content"]), token["id"], kind))
    for text, i, kind in entries:
        if type(i) is not int or not 0 <= i < size:
            raise refusal(path, f"id of {show(text)}", f"0 to {size - 1}, the vocab_size", i)
        tokens[i], types[i] = text, kind
    return tokens, types


def _merge(merge: Any) -> str:
    """ "a b"; a space inside a piece is written as the byte-level alphabet has it."""
    if isinstance(merge, str):
        return merge
    left, right = (piece.replace(" ", "Ġ") for piece in merge)
    return f"{left} {right}"


def _pattern(pre_tokenizer: dict[str, Any]) -> object:
    split, byte_level = pre_tokenizer["pretokenizers"]
    plain = split["behavior"] == "Isolated" and not split["invert"]
    bare = not byte_level["add_prefix_space"] and not byte_level["use_regex"]
    whole = split["type"] == "Split" and byte_level["type"] == "ByteLevel"
    return split["pattern"]["Regex"] if plain and bare and whole else None


def _special(folder: Path, tokens: list[Value]) -> dict[str, Value]:
    """Which tokens begin, end and fill texts, and the chat template."""
    path, found = folder / "tokenizer_config.json", {}
    config = read_json(folder / "config.json")
    if path.exists():
        found = read_json(path)
    metadata: dict[str, Value] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        text = found.get(f"{name}_token")
        text = text.get("content") if isinstance(text, dict) else text
        number = config.get(f"{name}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(text, str) and text in tokens:
            metadata[f"tokenizer.ggml.{key}_token_id"] = tokens.index(text)
        elif type(number) is int and 0 <= number < len(tokens):
            metadata[f"tokenizer.ggml.{key}_token_id"] = number
    add = found.get("add_bos_token")
    metadata["tokenizer.ggml.add_bos_token"] = add if isinstance(add, bool) else False
    template = found.get("chat_template")
    file = folder / "chat_template.jinja"
    if file.exists():
        try:
            template = file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise refusal(file, "file", "UTF-8 text", error) from None
    if isinstance(template, str):
        metadata["tokenizer.chat_template"] = template
    return metadata
