"""The tokenizer of a GGUF file: byte-level BPE, Gemma 4's BPE, or SentencePiece's scores.

Owns the way from text to token ids and back. Vocabulary and merges come from the file alone; the
merging itself is Hugging Face's ``tokenizers``, that by scores is spm.py.

The ids are those of llama.cpp, which published the vectors for this file format. It differs from
the tokenizer.json that Hugging Face reads for the same models in one point that matters: text is
NOT brought to Unicode normal form C first. "e" + U+0301 stays two code points, so that decoding
always gives back exactly the text that was encoded. Who wants transformers' ids for such text
calls ``unicodedata.normalize("NFC", text)`` before. And letters of Unicode 16 (2024) are letters
here and in transformers, while llama.cpp's tables are older.

Three kinds of token, by ``tokenizer.ggml.token_type``:

- control tokens (``<|im_start|>``) steer the model. They are never made from ordinary text: only
  ``encode(..., special=True)`` and the chat template's own text produce them. Where merges would
  make one (``</s>`` of ``</s`` and ``>``), the last of these merges is left out;
- user-defined tokens (``<think>``, ``<tool_call>``) are always made where their text stands;
- all others are pieces: of byte-level BPE, each character of which stands for one byte, or of text
  in which a space is "▁". Those that only fill the vocabulary up (type 5) are never made and stand
  for nothing.

Where a vocabulary asks for a space before every text, one stands after each special token, too, as
llama.cpp and SentencePiece have it; ``decode`` takes them away again.

Long texts are tokenised in parts, cut where a word ends in any case: the library needs up to 280
bytes of memory for a byte of text, and a prompt can be refused once it is too long. Other threads
run meanwhile.
"""

import codecs
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, SupportsIndex

from tokenizers import AddedToken, Encoding
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import BPE

from isobit.arguments import token_ids
from isobit.errors import ModelRefused, UsageError, shown
from isobit.text.pretokenizers import SPACE, PreTokenizer
from isobit.text.spm import ScoreMerges
from isobit.text.vocabulary import BYTE_OF_CHARACTER, Vocabulary

COUNTED = 4  # times as many tokens as there may be are counted, to say how many there are
PART = 64 * 1024  # characters after which a long text is cut at the next of these places
ALONE = 4096  # characters (1 ms) that keep Python's lock: to get it back may take 5 ms
MAX_UNBROKEN = 2 * 1024 * 1024  # bytes between two of them: 5 s of work and 0.6 GB


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
        self._bytes: dict[int, bytes] = {}  # of the tokens that came
        special = vocabulary.control | vocabulary.user_defined
        self._whole = frozenset(special.values())
        self._longest = max(*map(len, self._tokens), *(len(t.encode()) for t in special), 1)
        self._special = _Finder(special)
        self._user_defined = _Finder(vocabulary.user_defined)
        words = vocabulary.words
        self._breaks = words.breaks if words else None
        # A break inside a special token, perhaps after something visible, would cut it.
        if self._breaks and any(self._breaks.search(f"x{text}", 2) for text in special):
            self._breaks = None
        self._merge = self._by_scores() if words is None else self._by_merges(words)

    def _by_scores(self) -> Callable[[str], Iterator[Sequence[int]]]:
        """What makes ids of text that has no special tokens, some at a time."""
        vocabulary = self.vocabulary
        hidden = {*vocabulary.control.values(), *vocabulary.byte_tokens}
        pieces = {text: i for i, text in enumerate(self._tokens) if i not in hidden}
        of_byte = {byte: i for i, byte in vocabulary.byte_tokens.items()}
        return ScoreMerges(
            pieces,
            vocabulary.scores,
            [of_byte[byte] for byte in range(256)],
            unused=vocabulary.unused,
            space_prefix=vocabulary.space_prefix,
        ).encode

    def _by_merges(self, words: PreTokenizer) -> Callable[[str], Iterator[Sequence[int]]]:
        """The same for a vocabulary with merges."""
        pieces, merges, halves = self._checked_pieces()
        bpe = _built(lambda: words.build(pieces, merges), self.vocabulary.source)

        def encode(text: str) -> Iterator[Sequence[int]]:
            ids: list[int] = _run(bpe, text, offsets=False).ids
            if halves:
                while not halves.keys().isdisjoint(ids):
                    ids = [half for i in ids for half in halves.get(i, (i,))]
            yield ids

        return encode

    def _checked_pieces(
        self,
    ) -> tuple[dict[str, int], list[tuple[str, str]], dict[int, tuple[int, int]]]:
        """Vocabulary and merges as the library takes them, and halves.

        These are the two ids of which merges make a token that text must not become.
        """
        vocabulary, merges = self.vocabulary, self.vocabulary.merges
        ids = {text: i for i, text in enumerate(self._tokens)}
        made = list(map("".join, merges))
        parts = set(chain.from_iterable(merges))
        # The library checks this too, but panics where a merge makes what is longer than any piece.
        unknown = parts.union(made) - ids.keys()
        if unknown:
            raise ModelRefused(
                f"{vocabulary.source}: tokenizer.ggml.merges: expected merges of and into pieces "
                f"of the vocabulary, found {shown(min(unknown))}"
            )
        hidden = {*vocabulary.control, *(self._tokens[i] for i in vocabulary.unused)}
        reached = hidden.intersection(made)
        unreached = hidden - reached
        if not unreached.isdisjoint(parts):
            merges = [pair for pair in merges if unreached.isdisjoint(pair)]
        halves: dict[int, tuple[int, int]] = {}
        if reached:
            for (left, right), whole in zip(merges, map("".join, merges), strict=True):
                if whole in reached:
                    halves.setdefault(ids[whole], (ids[left], ids[right]))
        pieces = ids.copy()  # the others stay out altogether, so that nothing can make them
        for text in unreached:
            del pieces[text]
        return pieces, merges, halves

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

    def encode(
        self, text: str, *, special: bool, bos: bool = True, most: int | None = None
    ) -> list[int]:
        """Token ids of a text.

        Args:
            text: any text without lone surrogates.
            special: whether control tokens written out in the text become those tokens. Say
                False for text that others wrote: ``<|im_start|>`` in it is then plain characters.
            bos: begin with the beginning-of-sequence token, if the file asks for that.
            most: refuse a text of more tokens; how many there are is said up to four times as many,
                beyond which it is not tokenised.

        Raises:
            UsageError: the text is not a string, has lone surrogates, more than ``most`` tokens,
                or more than 2 MiB without a space or line where it could be cut.
        """
        first = self.vocabulary.bos_id if bos and self.vocabulary.add_bos else None
        ids = [] if first is None else [first]
        if most is not None and isinstance(text, str) and len(text) > most * self._longest:
            raise too_long(most, -(-len(text) // self._longest), counted=False)
        for some in self._encoded(text, self._special if special else self._user_defined):
            ids += some
            if most is not None and len(ids) > COUNTED * most:
                raise too_long(most, len(ids), counted=False)
        if most is not None and len(ids) > most:
            raise too_long(most, len(ids))
        return ids

    def _parts(self, text: str) -> Iterator[str]:
        """The text in parts of at least 64 Ki characters that can be tokenised one by one."""
        if not isinstance(text, str):
            raise _no_text(text)
        start = 0
        while start < len(text):
            found = None
            if self._breaks and len(text) - start > PART:
                found = self._breaks.search(text, start + PART)
            part = text[start : found.start() if found else None]
            try:
                data = part.encode()
            except UnicodeEncodeError:
                raise _no_text(text) from None
            if not (lost := self.vocabulary.missing).isdisjoint(data):
                byte = next(byte for byte in data if byte in lost)
                raise UsageError(
                    f"text: expected bytes that the model has tokens for, found 0x{byte:02X}"
                )
            size = len(data)
            if size > MAX_UNBROKEN and self.vocabulary.words:
                raise UsageError(
                    f"text: expected a space or a line break at least every {MAX_UNBROKEN} bytes, "
                    f"found {size} bytes without"
                )
            yield part
            start += len(part)

    def _encoded(self, text: str, whole: "_Finder") -> Iterator[Sequence[int]]:
        """Ids of a text in which some tokens are found as a whole, some at a time."""
        for part in self._parts(text):
            for piece in whole.split(part):
                if isinstance(piece, int):
                    yield (piece,)
                else:
                    yield from self._merge(piece)

    def split_special(self, text: str) -> Iterator[str | int]:
        """The pieces of a text: strings, and the ids of the special tokens between them."""
        return self._special.split(text)

    def token_bytes(self, token_id: SupportsIndex) -> bytes:
        """The bytes one token stands for; they need not be UTF-8 by themselves.

        Control and user-defined tokens give their text, unused ones nothing.

        Raises:
            UsageError: there is no such token.
        """
        try:
            index = operator.index(token_id)
        except TypeError:
            raise UsageError(f"token id: expected an integer, found {shown(token_id)}") from None
        if not 0 <= index < self.vocab_size:
            raise UsageError(f"token id: expected 0 to {self.vocab_size - 1}, found {shown(index)}")
        known = self._bytes.get(index)
        if known is None:
            known = self._bytes[index] = self._bytes_of(index)
        return known

    def _bytes_of(self, index: int) -> bytes:
        text = self._tokens[index]
        if index in self._whole:
            return text.encode()
        if index in self.vocabulary.unused:
            return b""
        if index in self.vocabulary.byte_tokens:
            return bytes([self.vocabulary.byte_tokens[index]])
        if self.vocabulary.byte_tokens:
            return text.replace(SPACE, " ").encode()
        try:
            return bytes([BYTE_OF_CHARACTER[c] for c in text])
        except KeyError:  # not a byte-level piece, then never made from text: shown as it stands
            return text.encode()

    def is_special(self, token_id: SupportsIndex) -> bool:
        """Whether a token is a control or user-defined one."""
        return operator.index(token_id) in self._whole

    def decode(self, ids: Iterable[SupportsIndex], *, skip_special: bool = False) -> str:
        """The text of a sequence of tokens; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: token ids.
            skip_special: leave control tokens out.

        Raises:
            UsageError: there is no such token.
        """
        stream = StreamDecoder(self, skip_special=skip_special, whole=True)
        return "".join(map(stream.push, token_ids("token id", ids))) + stream.flush()


class StreamDecoder:
    """Decodes a sequence token by token and never gives half a character.

    All pieces of ``push`` and the last of ``flush``, joined, are ``Tokenizer.decode`` of all ids
    if ``whole`` is set.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special: bool = True, whole: bool = False
    ) -> None:
        """Start a sequence; ``skip_special`` leaves control tokens out of the text.

        ``whole``: the ids are a text from its beginning, so that the space that some vocabularies
        put before a text is taken away; else they go on from a prompt and keep it.
        """
        self._tokenizer = tokenizer
        self._prefixes = whole and tokenizer.vocabulary.space_prefix
        self._at_prefix = self._prefixes
        self._skipped = frozenset(tokenizer.vocabulary.control.values() if skip_special else ())
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: SupportsIndex) -> str:
        """The text that one more token completes, perhaps empty."""
        piece = self._tokenizer.token_bytes(token_id)
        if self._prefixes:
            if self._at_prefix:
                piece = piece.removeprefix(b" ")
            self._at_prefix = self._tokenizer.is_special(token_id)
        if operator.index(token_id) in self._skipped:
            return ""
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """End the sequence: U+FFFD for a character that stays incomplete, else nothing."""
        return self._utf8.decode(b"", final=True)


class _Finder:
    """Finds some tokens in a text, in one pass however many they are."""

    def __init__(self, tokens: Mapping[str, int]) -> None:
        # A tokenizer of these tokens alone. Its cache would keep every short text, for each thread.
        self._finder = RustTokenizer(BPE(cache_capacity=0))
        self._finder.add_tokens([AddedToken(text, normalized=False) for text in tokens])
        self._ids = list(tokens.values())

    def split(self, text: str) -> Iterator[str | int]:
        """The pieces of a text: strings, and the ids of the tokens between them."""
        end = 0
        found = _run(self._finder, text)
        for index, (start, stop) in zip(found.ids, found.offsets, strict=True):
            if start > end:
                yield text[end:start]
            yield self._ids[index]
            end = stop
        if end < len(text):
            yield text[end:]


def _run(tokenizer: RustTokenizer, text: str, *, offsets: bool = True) -> Encoding:
    try:
        if len(text) <= ALONE:
            return tokenizer.encode(text, add_special_tokens=False)
        # For a list, even of one text, the library lets go of Python's lock.
        encode = tokenizer.encode_batch if offsets else tokenizer.encode_batch_fast
        return encode([text], add_special_tokens=False)[0]
    except TypeError:  # what the library says of a lone surrogate, too
        raise _no_text(text) from None
    except BaseException as error:
        if not _is_panic(error):
            raise
        raise UsageError(
            f"text: expected one that can be tokenised, found that the library gives up: "
            f"{shown(str(error))}"
        ) from None


def _built(build: Callable[[], RustTokenizer], source: str) -> RustTokenizer:
    try:
        return build()
    except BaseException as error:
        if not (isinstance(error, Exception) or _is_panic(error)):
            raise
        raise ModelRefused(
            f"{source}: tokenizer.ggml.merges: expected merges that fit the vocabulary, "
            f"found that the library gives up: {shown(str(error))}"
        ) from None


def _is_panic(error: BaseException) -> bool:
    """Whether a library in Rust panicked: a BaseException, which no handler for errors sees."""
    return type(error).__name__ == "PanicException"


def _no_text(found: object) -> UsageError:
    what = "a lone surrogate in it" if isinstance(found, str) else type(found).__name__
    return UsageError(f"text: expected a string of Unicode characters, found {what}")


def too_long(most: int, n: int, *, counted: bool = True) -> UsageError:
    """What to raise for a prompt of more than ``most`` tokens; ``counted``: all of its n are."""
    got = n if counted else f"at least {n}"
    return UsageError(f"prompt: expected at most {most} tokens (the context), got {got}")
