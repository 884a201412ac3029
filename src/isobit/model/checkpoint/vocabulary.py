"""tokenizer.json in the words of GGUF: byte-level BPE of the models that can be read, and
SentencePiece's as Llama 2 and Mistral have it."""

import re
from pathlib import Path
from typing import Any

from isobit.errors import shown
from isobit.gguf.header import ELEMENT_LIMIT, Value, refusal, show
from isobit.model.checkpoint.shards import read_bytes, read_json

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # token_type

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_PRE_TOKENIZERS = {  # by the pattern, and whether a word that is a token is that token
    (_QWEN2, False): "qwen2",
    (_QWEN35, False): "qwen35",
    (_LLAMA3, True): "llama-bpe",
}


def vocabulary(folder: Path, size: int) -> dict[str, Value]:
    """The tokenizer's metadata, of a vocabulary of ``size`` entries; {} for a folder without one.

    Raises ModelRefused for a tokenizer that is not known.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        return {}
    found = read_json(path)
    if size > ELEMENT_LIMIT:
        raise refusal(path, "entries", f"at most {ELEMENT_LIMIT}", f"{size}, a row of weights each")
    try:
        tokens, types = _tokens(path, found, size)
        merges: list[Value] = [_merge(m) for m in found["model"]["merges"]]
        kind, ignores = found["model"]["type"], bool(found["model"].get("ignore_merges"))
        pieces = bool(found["model"].get("byte_fallback"))
        name = "" if pieces else _PRE_TOKENIZERS.get((_pattern(found), ignores), "")
        metadata = _pieces(found, tokens, types) if pieces else {}
        begins = _begins_with_bos(found.get("post_processor"))
        others = _kinds_of(found.get("normalizer")) - (
            {"Prepend", "Replace"} if pieces else {"NFC"}
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError):
        raise refusal(path, "tokenizer", "byte-level BPE", "something else") from None
    if kind != "BPE" or not (name or pieces):
        known = ", ".join(_PRE_TOKENIZERS.values())
        got = f"{show(str(kind))} with another pattern"
        raise refusal(path, "tokenizer", f"byte-level BPE with the pattern of {known}", got)
    if others:
        expected = "one whose texts stay as they are, but for their spaces or normal form C"
        raise refusal(path, "normalizer", expected, shown(min(others)))
    if not pieces:
        metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name}
        metadata["tokenizer.ggml.merges"] = merges
    metadata |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    return metadata | _special(folder, tokens, begins=begins)


def _pieces(found: dict[str, Any], tokens: list[Value], types: list[Value]) -> dict[str, Value]:
    """SentencePiece merges by score: the first merges make the pieces of the greatest."""
    merges = [m.split(" ") if isinstance(m, str) else m for m in found["model"]["merges"]]
    rank = {left + right: i for i, (left, right) in reversed(list(enumerate(merges)))}
    unknown = found["model"].get("unk_token")
    for i, text in enumerate(tokens):
        if text == unknown:
            types[i] = _UNKNOWN
        elif types[i] == _NORMAL and re.fullmatch("<0x[0-9A-F]{2}>", str(text)):
            types[i] = _BYTE
    before = found.get("normalizer") or {}
    steps = [before, *(before.get("normalizers") or ()), found.get("pre_tokenizer") or {}]
    prefix = any(
        step.get("type") == "Prepend" or step.get("prepend_scheme") in ("first", "always")
        for step in steps
    )
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [float(-rank.get(str(text), len(merges))) for text in tokens],
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def _kinds_of(normalizer: Any) -> set[str]:
    """The types of a normalizer, or of those that it is a sequence of."""
    if normalizer is None:
        return set()
    if normalizer["type"] == "Sequence":
        return set().union(*map(_kinds_of, normalizer["normalizers"]))
    return {str(normalizer["type"])}


def _begins_with_bos(processor: Any) -> bool:
    """Whether what follows the tokenizer puts a special token before every text."""
    if not isinstance(processor, dict):
        return False
    if processor["type"] == "Sequence":
        return any(_begins_with_bos(p) for p in processor["processors"])
    return processor["type"] == "TemplateProcessing" and "SpecialToken" in processor["single"][0]


def _tokens(path: Path, found: dict[str, Any], size: int) -> tuple[list[Value], list[Value]]:
    tokens: list[Value] = [f"[PAD{i}]" for i in range(size)]
    types: list[Value] = [_UNUSED] * size
    entries = [(str(text), i, _NORMAL) for text, i in found["model"]["vocab"].items()]
    for token in found.get("added_tokens") or []:
        kind = _CONTROL if token["special"] else _USER_DEFINED
        entries.append((str(token["content"]), token["id"], kind))
    for text, i, kind in entries:
        if type(i) is not int or not 0 <= i < size:
            expected = f"0 to {size - 1}, the vocab_size"
            raise refusal(path, f"id of {show(text)}", expected, shown(i))
        tokens[i], types[i] = text, kind
    return tokens, types


def _merge(merge: Any) -> str:
    """ "a b"; a space inside a piece is written as the byte-level alphabet has it."""
    if isinstance(merge, str):
        return merge
    left, right = (piece.replace(" ", "Ġ") for piece in merge)
    return f"{left} {right}"


def _pattern(found: dict[str, Any]) -> str:
    split, byte_level = found["pre_tokenizer"]["pretokenizers"]
    plain = split["behavior"] == "Isolated" and not split["invert"]
    bare = not byte_level["add_prefix_space"] and not byte_level["use_regex"]
    whole = split["type"] == "Split" and byte_level["type"] == "ByteLevel"
    return str(split["pattern"]["Regex"]) if plain and bare and whole else ""


def _special(folder: Path, tokens: list[Value], *, begins: bool) -> dict[str, Value]:
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
    metadata["tokenizer.ggml.add_bos_token"] = add if isinstance(add, bool) else begins
    for name, template in _templates(folder, found.get("chat_template")).items():
        metadata[f"tokenizer.chat_template{name}"] = template
    return metadata


def _templates(folder: Path, said: Any) -> dict[str, Value]:
    """Chat templates by what follows "tokenizer.chat_template" in GGUF's keys.

    ``said`` is what tokenizer_config.json has: a template, or several with names. Where templates
    have files of their own, those alone count, as in transformers.
    """
    named = {"default": said} if isinstance(said, str) else {}
    for one in said if isinstance(said, list) else ():
        if isinstance(one, dict) and isinstance(one.get("template"), str):
            named[str(one.get("name"))] = one["template"]
    files = {
        "default": folder / "chat_template.jinja",
        "tool_use": folder / "additional_chat_templates" / "tool_use.jinja",
    }
    try:
        own = {name: read_bytes(f).decode() for name, f in files.items() if f.exists()}
    except UnicodeDecodeError as error:
        raise refusal(folder, "chat template", "UTF-8 text", error) from None
    keys = {"default": "", "tool_use": ".tool_use"}
    return {keys[name]: text for name, text in (own or named).items() if name in keys}
