"""What a GGUF file says of its tokenizer, checked.

Owns the ``tokenizer.*`` metadata: reads them into a Vocabulary or refuses the file in one line.
Nothing in a file is trusted: counts, types, ranges and duplicates are checked before use.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from isobit.errors import ModelRefused

# Pre-tokenizers that split text in the same way as "qwen2". The second is the name llama.cpp's
# converter gives to DeepSeek's distillations into Qwen models; llama.cpp reads both as one.
QWEN2_NAMES = ("qwen2", "deepseek-r1-qwen")

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type; 5 unused, 6 byte

END_OF_GENERATION_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
END_OF_GENERATION_TEXTS = ("<|im_end|>", "<|endoftext|>")


def _byte_characters() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's table).

    Printable Latin-1 characters stand for themselves; the other bytes, in order, are U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_characters()


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE vocabulary as a GGUF file holds it.

    Attributes:
        tokens: text of every token; a token's id is its place.
        control: text to id of the tokens that steer the model.
        user_defined: text to id of the tokens that are matched as a whole in any text.
        merges: pairs of pieces to join, the most urgent first.
        bos_id, eos_id: beginning and end of a sequence, where the file names them.
        add_bos: whether every text begins with ``bos_id``.
        stop_ids: tokens that end a generation.
        chat_template: Jinja source or None.
        source: name of the file, for messages.
    """

    tokens: list[str]
    control: dict[str, int]
    user_defined: dict[str, int]
    merges: list[tuple[str, str]] = field(repr=False)
    bos_id: int | None
    eos_id: int | None
    add_bos: bool
    stop_ids: frozenset[int]
    chat_template: str | None
    source: str

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], source: str) -> "Vocabulary":
        """Read the ``tokenizer.*`` keys of a file's metadata.

        Args:
            metadata: the file's key-value pairs; arrays as sequences or NumPy arrays.
            source: name of the file, for messages.

        Raises:
            ModelRefused: no tokenizer, one of another kind, or a damaged one.
        """
        fields = _Fields(metadata, source)
        if "tokenizer.ggml.model" not in metadata:
            fields.refuse("tokenizer.ggml.model", "a tokenizer", "none: use token ids, not text")
        fields.one_of("tokenizer.ggml.model", ("gpt2",))
        fields.one_of("tokenizer.ggml.pre", QWEN2_NAMES)
        tokens = fields.tokens("tokenizer.ggml.tokens")
        types = fields.types("tokenizer.ggml.token_type", len(tokens))
        special = [(i, tokens[i], types[i]) for i in np.flatnonzero(types != NORMAL).tolist()]
        control = {text: i for i, text, kind in special if _is_control(text, kind)}
        user_defined = {
            text: i for i, text, kind in special if kind == USER_DEFINED and text not in control
        }
        if any(text == "" for _, text, _ in special):
            fields.refuse("tokenizer.ggml.tokens", "a text for every special token", "an empty one")
        missing = BYTE_OF_CHARACTER.keys() - (set(tokens) - control.keys() - user_defined.keys())
        if missing:
            found = f"none for {len(missing)} of them"
            fields.refuse("tokenizer.ggml.tokens", "a token for each of 256 bytes", found)
        ids = {
            name: fields.token_id(f"tokenizer.ggml.{name}", len(tokens))
            for name in ("bos_token_id", *END_OF_GENERATION_KEYS)
        }
        add_bos = fields.flag("tokenizer.ggml.add_bos_token")
        if add_bos and ids["bos_token_id"] is None:
            fields.refuse("tokenizer.ggml.bos_token_id", "a token, as add_bos_token is set", "none")
        stops = [ids[name] for name in END_OF_GENERATION_KEYS]
        stops += [control.get(text) for text in END_OF_GENERATION_TEXTS]
        return cls(
            tokens=tokens,
            control=control,
            user_defined=user_defined,
            merges=fields.merges("tokenizer.ggml.merges"),
            bos_id=ids["bos_token_id"],
            eos_id=ids["eos_token_id"],
            add_bos=add_bos,
            stop_ids=frozenset(i for i in stops if i is not None),
            chat_template=fields.text("tokenizer.chat_template"),
            source=source,
        )


def _is_control(text: str, kind: int) -> bool:
    # Converters mark Qwen's <|fim_…|>, <|repo_name|> and <|file_sep|> as user-defined, which any
    # text could then hold; llama.cpp makes control tokens of them, too.
    return kind in (UNKNOWN, CONTROL) or (
        kind == USER_DEFINED and text.startswith("<|") and text.endswith("|>") and len(text) > 4
    )


class _Fields:
    """Typed access to metadata; every failure names file, key, expected and found in one line."""

    def __init__(self, metadata: Mapping[str, Any], source: str) -> None:
        self._metadata = metadata
        self._source = source

    def refuse(self, key: str, expected: str, found: str) -> NoReturn:
        raise ModelRefused(f"{self._source}: {key}: expected {expected}, found {found}")

    def one_of(self, key: str, accepted: tuple[str, ...]) -> None:
        value = self._metadata.get(key)
        if not isinstance(value, str) or value not in accepted:
            self.refuse(key, " or ".join(map(repr, accepted)), shown(value))

    def flag(self, key: str) -> bool:
        value = self._metadata.get(key, False)
        if not isinstance(value, bool):
            self.refuse(key, "true or false", shown(value))
        return value

    def text(self, key: str) -> str | None:
        value = self._metadata.get(key)
        if value is not None and not isinstance(value, str):
            self.refuse(key, "a string", shown(value))
        return value

    def token_id(self, key: str, size: int) -> int | None:
        value = self._metadata.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            self.refuse(key, "a token id", shown(value))
        if not 0 <= value < size:
            self.refuse(key, f"a token id below {size}", shown(int(value)))
        return int(value)

    def strings(self, key: str) -> list[str]:
        value = self._metadata.get(key)
        if not isinstance(value, (Sequence, np.ndarray)) or isinstance(value, (str, bytes)):
            self.refuse(key, "an array of strings", shown(value))
        strings = list(value)
        if any(type(string) is not str for string in strings):
            self.refuse(key, "an array of strings", "something else in it")
        return strings

    def tokens(self, key: str) -> list[str]:
        tokens = self.strings(key)
        if not tokens:
            self.refuse(key, "at least one token", "none")
        if len(set(tokens)) != len(tokens):
            (text, times), *_ = Counter(tokens).most_common(1)
            self.refuse(key, "every token once", f"{shown(text)} {times} times")
        try:
            "".join(tokens).encode()
        except UnicodeEncodeError as error:
            self.refuse(key, "Unicode text", str(error)[:80])
        return tokens

    def types(self, key: str, size: int) -> npt.NDArray[np.int64]:
        value = self._metadata.get(key)
        if not isinstance(value, (Sequence, np.ndarray)):
            self.refuse(key, "an array of integers", shown(value))
        try:
            types = np.asarray(value)
        except ValueError:  # arrays within
            self.refuse(key, "an array of integers", "something else in it")
        if types.dtype.kind not in "iu" or types.shape != (size,):
            found = f"{types.dtype} of shape {types.shape}"
            self.refuse(key, f"{size} integers, one a token", found)
        if types.min() < 1 or types.max() > 6:
            self.refuse(key, "types from 1 to 6", f"{types.min()} to {types.max()}")
        return types.astype(np.int64)

    def merges(self, key: str) -> list[tuple[str, str]]:
        # A pair that stands twice keeps its first rank, as in llama.cpp.
        pairs = dict.fromkeys(tuple(merge.split(" ")) for merge in self.strings(key))
        for pair in pairs:
            if len(pair) != 2:
                self.refuse(key, "two pieces with one space between", shown(" ".join(pair)))
        return list(pairs)  # type: ignore[arg-type]  # all of length 2


def shown(value: object) -> str:
    """A value for a message: on one line, and short whatever a file holds."""
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:59] + "…")
    if value is None:
        return "nothing"
    if isinstance(value, (int, float)) and abs(value) < 2**64:
        return str(value)
    return type(value).__name__
