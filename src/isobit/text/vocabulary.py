"""What a GGUF file says of its tokenizer, checked.

Owns the ``tokenizer.*`` metadata: reads them into a Vocabulary or refuses the file in one line.
Nothing in a file is trusted: counts, types, ranges and duplicates are checked before use.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from isobit.errors import ModelRefused, printable, shown
from isobit.text.pretokenizers import GEMMA4, PRETOKENIZERS, PreTokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # tokenizer.ggml.token_type; 6 byte

# The library's search for special tokens costs about a hundred bytes and a microsecond for each of
# these; the largest vocabulary known (262,144 tokens, 6,242 of them special) has 75 thousand.
MAX_SPECIAL_BYTES = 512 * 1024

# What ends a generation: the tokens that these keys name, and special tokens of these texts. Both
# lists are llama.cpp's. It looks for the texts among ordinary tokens, too, and so ends a page of
# HTML at the "</s>" that Qwen's vocabulary has for it.
END_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
END_TEXTS = frozenset(
    {
        *("<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|end|>"),
        *("<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<|tool_response>", "<turn|>"),
        *("<end_of_turn>", "<end_of_utterance>", "<eos>", "</s>", "[EOS]"),
        *("<EOT>", "_<EOT>", "[EOT]"),
    }
)
FIM_TEXTS = {  # looked for where the key is missing
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}


def _byte_characters() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's table).

    Printable Latin-1 characters stand for themselves; the other bytes, in order, are U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_characters()
NEEDED = frozenset(b"\n" + bytes(range(0x20, 0x7F)))  # StarCoder and Falcon lack some of the others
NEVER = frozenset((0xC0, 0xC1, *range(0xF5, 0x100)))  # bytes that UTF-8 has no use for
BYTE_OF_TEXT = {f"<0x{byte:02X}>": byte for byte in range(256)}  # where text is merged as text


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary as a GGUF file holds it.

    Attributes:
        words: how text is cut before merges join it; None where scores do (model ``llama``).
        tokens: text of every token; a token's id is its place.
        byte_tokens: id to byte of the tokens for single bytes, where text is not merged as bytes.
        missing: bytes that no token stands for; text that has one cannot be written.
        control: text to id of the tokens that steer the model.
        user_defined: text to id of the tokens that are matched as a whole in any text.
        unused: ids of tokens that fill the vocabulary up and stand for nothing.
        merges: pairs of pieces to join, the most urgent first.
        scores: of every token, where there are no merges: the greater, the sooner it is made.
        space_prefix: whether a space goes before every text.
        bos_id, eos_id: beginning and end of a sequence, where the file names them.
        add_bos: whether every text begins with ``bos_id``.
        stop_ids: tokens that end a generation.
        chat_template: Jinja source or None.
        tool_template: the template for conversations with tools, where it is another one.
        source: name of the file, for messages.
    """

    words: PreTokenizer | None
    tokens: list[str]
    byte_tokens: dict[int, int]
    missing: frozenset[int]
    control: dict[str, int]
    user_defined: dict[str, int]
    unused: frozenset[int]
    merges: list[tuple[str, str]] = field(repr=False)
    scores: list[float] = field(repr=False)
    space_prefix: bool
    bos_id: int | None
    eos_id: int | None
    add_bos: bool
    stop_ids: frozenset[int]
    chat_template: str | None
    tool_template: str | None
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
        source = printable(source)  # a path can have line ends, and messages have one line
        fields = _Fields(metadata, source)
        if "tokenizer.ggml.model" not in metadata:
            fields.refuse("tokenizer.ggml.model", "a tokenizer", "none" + _IDS)
        words = fields.words()
        tokens = fields.tokens("tokenizer.ggml.tokens")
        types = fields.types("tokenizer.ggml.token_type", len(tokens))
        kinds = {i: int(types[i]) for i in np.flatnonzero(types != NORMAL).tolist()}
        byte_level = words is not None and words.byte_level
        special = {tokens[i]: (i, _kind(tokens[i], kind, byte_level)) for i, kind in kinds.items()}
        control = {text: i for text, (i, kind) in special.items() if kind == CONTROL and text}
        user_defined = {
            text: i for text, (i, kind) in special.items() if kind == USER_DEFINED and text
        }
        size = sum(len(text.encode()) for text in (*control, *user_defined))
        if size > MAX_SPECIAL_BYTES:
            expected = f"special tokens of at most {MAX_SPECIAL_BYTES} bytes in all"
            fields.refuse("tokenizer.ggml.token_type", expected, f"{size} bytes")
        bytes_ = BYTE_OF_CHARACTER if byte_level else BYTE_OF_TEXT
        missing = {bytes_[text] for text in bytes_.keys() - set(tokens)}
        if not missing.isdisjoint(NEEDED if byte_level else range(256)):
            expected = "a token for each byte" + (" of printable ASCII" if byte_level else "")
            fields.refuse("tokenizer.ggml.tokens", expected, f"none for {len(missing)} bytes")
        bos_id = fields.token_id("tokenizer.ggml.bos_token_id", len(tokens))
        usual = words is None or words.adds_bos
        add_bos = fields.flag("tokenizer.ggml.add_bos_token", usual) or words is GEMMA4
        if add_bos and bos_id is None:
            fields.refuse("tokenizer.ggml.bos_token_id", "a token, as texts begin with it", "none")
        prefixed = words is None and fields.flag("tokenizer.ggml.add_space_prefix", True)
        return cls(
            words=words,
            tokens=tokens,
            byte_tokens={i: bytes_[t] for i, t in enumerate(tokens) if t in bytes_}
            if not byte_level
            else {},
            missing=frozenset(missing),
            control=control,
            user_defined=user_defined,
            unused=frozenset(i for i, kind in special.values() if kind == UNUSED),
            merges=fields.merges("tokenizer.ggml.merges") if words else [],
            scores=[] if words else fields.scores("tokenizer.ggml.scores", len(tokens)),
            space_prefix=prefixed,
            bos_id=bos_id,
            eos_id=fields.token_id("tokenizer.ggml.eos_token_id", len(tokens)),
            add_bos=add_bos,
            stop_ids=_stop_ids(fields, len(tokens), control | user_defined),
            chat_template=fields.text("tokenizer.chat_template"),
            tool_template=fields.text("tokenizer.chat_template.tool_use"),
            source=source,
        )


def stop_ids(metadata: Mapping[str, Any], size: int, source: str) -> frozenset[int]:
    """The tokens that end a generation, for a file without a tokenizer: those its keys name.

    Raises:
        ModelRefused: a key names no token below ``size``.
    """
    return _stop_ids(_Fields(metadata, printable(source)), size, {})


def _stop_ids(fields: "_Fields", size: int, special: Mapping[str, int]) -> frozenset[int]:
    found: set[int | None] = {i for text, i in special.items() if text in END_TEXTS}
    for name in END_KEYS:
        key = f"tokenizer.ggml.{name}_token_id"
        texts = FIM_TEXTS.get(name, ())
        default = next((special[text] for text in texts if text in special), None)
        named = fields.token_id(key, size)
        found |= {named, default if named is None else named} - {None}
    found |= set(fields.token_ids("tokenizer.ggml.eos_token_ids", size))

    def has(*texts: str) -> bool:
        return any(special.get(text) in found for text in texts)

    # <|end|> ends a message of a longer answer where <|return|> or <|call|> end that, and </s> is
    # an ordinary tag to the models that know <|tool_response>.
    if has("<|call|>", "<|calls|>") and has("<|return|>", "<|flush|>"):
        found.discard(special.get("<|end|>"))
    if has("<|tool_response>"):
        found.discard(special.get("</s>"))
    return frozenset(i for i in found if i is not None)


def _kind(text: str, kind: int, byte_level: bool) -> int:
    """What a token of this type is here: NORMAL, CONTROL, USER_DEFINED, UNUSED or the type."""
    # Text cannot do without the token of a byte, whatever the file calls it. Those that stand for
    # themselves are found as a whole, as transformers finds any special token. Bytes that UTF-8
    # never has are no loss: deepseek-coder's user-defined "õ", "÷", "Á", … are those characters.
    if byte_level and text in BYTE_OF_CHARACTER and BYTE_OF_CHARACTER[text] not in NEVER:
        return USER_DEFINED if text.isascii() and kind != UNUSED else NORMAL
    # Converters mark Qwen's <|fim_…|>, <|repo_name|> and <|file_sep|> as user-defined, which any
    # text could then hold; llama.cpp makes control tokens of them, too.
    named = text.startswith("<|") and text.endswith("|>") and len(text) > 4
    return CONTROL if kind == UNKNOWN or (kind == USER_DEFINED and named) else kind


class _Fields:
    """Typed access to metadata; every failure names file, key, expected and found in one line."""

    def __init__(self, metadata: Mapping[str, Any], source: str) -> None:
        self._metadata = metadata
        self._source = source

    def refuse(self, key: str, expected: str, found: str) -> NoReturn:
        raise ModelRefused(f"{self._source}: {key}: expected {expected}, found {found}")

    def words(self) -> PreTokenizer | None:
        """How text is cut into words, by the kind of tokenizer."""
        kinds = {"gpt2": None, "llama": None, "gemma4": GEMMA4}
        model = self._metadata.get("tokenizer.ggml.model")
        if not isinstance(model, str) or model not in kinds:
            known = " or ".join(map(repr, kinds))
            self.refuse("tokenizer.ggml.model", known, shown(model) + _IDS)
        if model != "gpt2":
            return kinds[model]
        pre = self._metadata.get("tokenizer.ggml.pre")
        if not isinstance(pre, str) or pre not in PRETOKENIZERS:
            first = ", ".join(list(PRETOKENIZERS)[:3])
            known = f"one of {len(PRETOKENIZERS)} known ones ({first}, …)"
            self.refuse("tokenizer.ggml.pre", known, shown(pre) + _IDS)
        return PRETOKENIZERS[pre]

    def numbers(
        self, key: str, size: int, kinds: tuple[type, ...], what: str
    ) -> npt.NDArray[np.generic]:
        """An array of ``size`` numbers of these types, or NumPy's array of such, one a token."""
        value = self._metadata.get(key)
        if not isinstance(value, (Sequence, np.ndarray)) or isinstance(value, (str, bytes)):
            self.refuse(key, f"an array of {what}", shown(value))
        # Before NumPy makes an array of it: of texts, each would be as long as the longest.
        if not isinstance(value, np.ndarray) and not set(map(type, value)) <= {*kinds}:
            self.refuse(key, f"an array of {what}", "something else in it")
        numbers = np.asarray(value)
        letters = "iuf" if float in kinds else "iu"
        if numbers.dtype.kind not in letters or numbers.shape != (size,):
            found = f"{numbers.dtype} of shape {numbers.shape}"
            self.refuse(key, f"{size} {what}, one a token", found)
        return numbers

    def scores(self, key: str, size: int) -> list[float]:
        scores = self.numbers(key, size, (int, float), "numbers")
        if not np.isfinite(scores).all():
            self.refuse(key, "finite numbers", "NaN or infinity")
        numbers: list[float] = scores.astype(np.float64).tolist()
        return numbers

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._metadata.get(key, default)
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

    def token_ids(self, key: str, size: int) -> list[int]:
        value = self._metadata.get(key, ())
        if not isinstance(value, (Sequence, np.ndarray)) or isinstance(value, (str, bytes)):
            self.refuse(key, "an array of token ids", shown(value))
        for one in value:
            whole = isinstance(one, (int, np.integer)) and not isinstance(one, bool)
            if not whole or not 0 <= one < size:
                self.refuse(key, f"token ids below {size}", shown(one))
        return [int(one) for one in value]

    def strings(self, key: str) -> list[str]:
        value = self._metadata.get(key)
        if not isinstance(value, (Sequence, np.ndarray)) or isinstance(value, (str, bytes)):
            self.refuse(key, "an array of strings", shown(value))
        strings = list(value)
        if set(map(type, strings)) - {str}:
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
        types = self.numbers(key, size, (int,), "integers").astype(np.int64)
        if types.min() < 1 or types.max() > 6:
            self.refuse(key, "types from 1 to 6", f"{types.min()} to {types.max()}")
        return types

    def merges(self, key: str) -> list[tuple[str, str]]:
        # A pair that stands twice keeps its first rank, as in llama.cpp.
        merges = dict.fromkeys(self.strings(key))
        # Counted before any is split: one can have millions of spaces.
        if set(map(str.count, merges, repeat(" "))) - {1}:
            odd = next(merge for merge in merges if merge.count(" ") != 1)
            self.refuse(key, "two pieces with one space between", shown(odd))
        return [(first, second) for first, second in map(str.split, merges, repeat(" "))]


_IDS = ": use token ids, not text"
