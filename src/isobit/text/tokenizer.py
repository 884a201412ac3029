"""The tokenizer of a GGUF file: byte-level BPE with Qwen's pre-tokenizer.

Owns the way from text to token ids and back. Vocabulary and merges come from the file alone; the
merging itself is Hugging Face's ``tokenizers``.

The ids are those of llama.cpp, which published the vectors for this file format. It differs from
the tokenizer.json that Hugging Face reads for the same models in one point that matters: text is
NOT brought to Unicode normal form C first. "e" + U+0301 stays two code points, so that decoding
always gives back exactly the text that was encoded. Who wants transformers' ids for such text
calls ``unicodedata.normalize("NFC", text)`` before. And letters of Unicode 16 (2024) are letters
here and in transformers, while llama.cpp's tables are older.

Three kinds of token, by ``tokenizer.ggml.token_type``:

- control tokens (``<|im_start|>``) steer the model. They are never made from ordinary text: only
  ``encode(..., special=True)`` and the chat template's own text produce them;
- user-defined tokens (``<think>``, ``<tool_call>``) are always made where their text stands;
- all others are pieces of byte-level BPE, each character of which stands for one byte.
"""

import codecs
import operator
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, SupportsIndex

from tokenizers import AddedToken, Encoding, Regex
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

from isobit.errors import ModelRefused, UsageError
from isobit.text.vocabulary import BYTE_OF_CHARACTER, Vocabulary, shown

# Words of Qwen2's tokenizer: contractions, letters with what stands before them, single digits,
# runs of other signs, line ends, spaces. Cases are spelt out where Qwen's own file says (?i:),
# since that also matches U+017F (long s); llama.cpp does not.
QWEN2_WORDS = (
    r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)


class Tokenizer:
    """Text to token ids and back. Immutable, and safe to use from several threads.

    Attributes:
        vocabulary: what the file says: tokens, special tokens, end-of-generation ids, template.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Build the merger from a checked vocabulary (0.2 s for 151,936 tokens).

        Raises:
            ModelRefused: a merge names a piece that is not in the vocabulary.
        """
        self.vocabulary = vocabulary
        self._tokens = vocabulary.tokens
        self._whole = frozenset([*vocabulary.control.values(), *vocabulary.user_defined.values()])
        # Without the control tokens: no sequence of merges can reach one from ordinary text.
        pieces = {t: i for i, t in enumerate(vocabulary.tokens) if t not in vocabulary.control}
        merges = vocabulary.merges
        # The library checks this too, but panics where a merge makes what is longer than any piece.
        unknown = set(chain.from_iterable(merges)).union(map("".join, merges)) - pieces.keys()
        if unknown:
            raise ModelRefused(
                f"{vocabulary.source}: tokenizer.ggml.merges: expected merges of and into pieces "
                f"of the vocabulary, found {shown(min(unknown))}"
            )
        self._bpe = RustTokenizer(BPE(pieces, merges))
        self._bpe.pre_tokenizer = Sequence(
            [
                Split(Regex(QWEN2_WORDS), behavior="isolated"),
                ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        self._bpe.add_tokens([AddedToken(t, normalized=False) for t in vocabulary.user_defined])
        # A tokenizer of control tokens alone finds them in one pass, however many there are.
        self._finder = RustTokenizer(BPE())
        self._finder.add_tokens([AddedToken(t, normalized=False) for t in vocabulary.control])
        self._found_ids = list(vocabulary.control.values())

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return len(self._tokens)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a generation."""
        return self.vocabulary.stop_ids

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], source: str) -> "Tokenizer":
        """Build the tokenizer that a GGUF file describes.

        Args:
            metadata: the file's key-value pairs; arrays as sequences or NumPy arrays.
            source: name of the file, for messages.

        Raises:
            ModelRefused: the file has no tokenizer, one of another kind, or a damaged one.
        """
        return cls(Vocabulary.from_metadata(metadata, source))

    def encode(self, text: str, *, special: bool, bos: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: any text without lone surrogates.
            special: whether control tokens written out in the text become those tokens. Say
                False for text that others wrote: ``<|im_start|>`` in it is then plain characters.
            bos: begin with the beginning-of-sequence token, if the file asks for that.

        Raises:
            UsageError: the text is not a string or has lone surrogates.
        """
        first = self.vocabulary.bos_id if bos and self.vocabulary.add_bos else None
        ids = [] if first is None else [first]
        if not special:
            return ids + _run(self._bpe, text).ids
        for piece in self.split_control(text):
            ids += [piece] if isinstance(piece, int) else _run(self._bpe, piece).ids
        return ids

    def split_control(self, text: str) -> Iterator[str | int]:
        """The pieces of a text: strings, and the ids of the control tokens between them."""
        end = 0
        found = _run(self._finder, text)
        for index, (start, stop) in zip(found.ids, found.offsets, strict=True):
            if start > end:
                yield text[end:start]
            yield self._found_ids[index]
            end = stop
        if end < len(text):
            yield text[end:]

    def token_bytes(self, token_id: SupportsIndex) -> bytes:
        """The bytes one token stands for; they need not be UTF-8 by themselves.

        Control and user-defined tokens give their text.

        Raises:
            UsageError: there is no such token.
        """
        try:
            index = operator.index(token_id)
        except TypeError:
            raise UsageError(f"token id: expected an integer, found {shown(token_id)}") from None
        if not 0 <= index < self.vocab_size:
            raise UsageError(f"token id: expected 0 to {self.vocab_size - 1}, found {shown(index)}")
        text = self._tokens[index]
        if index in self._whole:
            return text.encode()
        try:
            return bytes([BYTE_OF_CHARACTER[c] for c in text])
        except KeyError:  # not a byte-level piece, then never made from text: shown as it stands
            return text.encode()

    def decode(self, ids: Iterable[SupportsIndex], *, skip_special: bool = False) -> str:
        """The text of a sequence of tokens; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: token ids.
            skip_special: leave control tokens out.

        Raises:
            UsageError: there is no such token.
        """
        stream = StreamDecoder(self, skip_special=skip_special)
        return "".join([stream.push(i) for i in ids]) + stream.flush()


class StreamDecoder:
    """Decodes a sequence token by token and never gives half a character.

    All pieces of ``push`` and the last of ``flush``, joined, are ``Tokenizer.decode`` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        """Start a sequence; ``skip_special`` leaves control tokens out of the text."""
        self._tokenizer = tokenizer
        self._skipped = frozenset(tokenizer.vocabulary.control.values() if skip_special else ())
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: SupportsIndex) -> str:
        """The text that one more token completes, perhaps empty."""
        piece = self._tokenizer.token_bytes(token_id)
        if operator.index(token_id) in self._skipped:
            return ""
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """End the sequence: U+FFFD for a character that stays incomplete, else nothing."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


def _run(tokenizer: RustTokenizer, text: str) -> Encoding:
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except TypeError:  # what the library says of a lone surrogate, too
        found = "a lone surrogate in it" if isinstance(text, str) else type(text).__name__
        raise UsageError(f"text: expected a string of Unicode characters, found {found}") from None
