"""Holding an answer to a grammar: which tokens may come next, from llguidance's parser.

What is allowed follows from the grammar, the tokenizer and the tokens so far, and from nothing
else; so a receipt that holds the grammar can be checked.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from isobit.errors import BackendUnavailable, UsageError
from isobit.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MOST_CHARACTERS = 1 << 20  # of a grammar
STACK = 512 << 20  # bytes, most of them never touched: the library goes as deep as rules refer
FIRST_SECONDS = 0.25  # of the processor for the first step; a thousandth of it is usual
STEP_SECONDS = 0.005  # for each further one, on average: all others wait for it
CACHED = 64  # grammars; agents send the same tools with each request


T = TypeVar("T")


@dataclass(frozen=True)
class Grammar:
    """What an answer is held to, and from where on."""

    text: str
    """As llguidance takes it: JSON, or its form of Lark."""
    thinking: bool | None = False
    """Whether the prompt ends within thinking, which is free; None: the answer may begin it."""
    opens: str = ""
    """The tag that begins thinking."""
    closes: str = ""
    """The tag that ends it."""
    call: str = ""
    """If it is given, text is free, and the grammar holds from each of these tags on until it is
    fulfilled; else it holds from the beginning of the answer to its end."""


class Grammars:
    """Compiles grammars for one tokenizer. Its methods may be called from several threads."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, ends: frozenset[int]) -> None:
        """``vocabulary``: how many logits a row has; ``ends``: tokens that end an answer."""
        self.tokenizer = tokenizer
        self.ends = ends
        self.special = tokenizer.vocabulary.control | tokenizer.vocabulary.user_defined
        lines = (tokenizer.encode(t, special=False, bos=False) for t in ("\n", "\n\n"))
        self.blank = frozenset(ids[0] for ids in lines if len(ids) == 1)
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self._library: LLTokenizer | None = None
        self._matcher = lru_cache(CACHED)(self._compiled)

    def constraint(self, grammar: Grammar) -> Constraint:
        """For one answer. May take long: a second the first time, and as the grammar is.

        Raises UsageError, which says what of the grammar is not possible; BackendUnavailable if
        llguidance is not installed.
        """
        if len(grammar.text) > MOST_CHARACTERS:
            raise UsageError(f"expected at most {MOST_CHARACTERS} characters")
        return Constraint(self, grammar, self._matcher(grammar.text).deep_copy())

    def tokens_of(self, data: bytes) -> list[int]:
        """Ids that stand for these bytes."""
        return self._tokens().tokenize_bytes(data)

    def _compiled(self, text: str) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits  # noqa: PLC0415 - an extra

        limits = LLParserLimits(max_grammar_size=200_000, verbose_errors=False)
        tokens = self._tokens()

        def compiled() -> tuple[LLMatcher, float]:
            matcher = LLMatcher(tokens, text, log_level=0, limits=limits)
            begun = time.thread_time()
            if not matcher.is_error():
                matcher.compute_bitmask()
            return matcher, time.thread_time() - begun

        matcher, seconds = _with_deep_stack(compiled)
        if matcher.is_error():
            raise UsageError(_reason(matcher.get_error()))
        if seconds > FIRST_SECONDS:
            raise UsageError(f"its first step takes more than {FIRST_SECONDS} s")
        return matcher

    def _tokens(self) -> LLTokenizer:
        try:
            from llguidance import LLTokenizer, TokenizerWrapper  # noqa: PLC0415 - an extra
        except ImportError:
            raise BackendUnavailable(
                "grammar: llguidance is not installed: pip install '.[serve]'"
            ) from None
        with self._lock:
            if self._library is None:
                self._library = LLTokenizer(
                    TokenizerWrapper(_Tokens(self)),
                    n_vocab=self._vocabulary,
                    eos_token=sorted(self.ends),
                )
            return self._library


def _reason(error: str) -> str:
    """What the library says of a grammar, on a line: without its excerpts of what it was given,
    which is not what a client wrote."""
    if error.startswith("NoExtensionBias"):
        return "a rule or a schema that leads back to itself before anything is written"
    said = re.split(r"\n *\d+ \| |\n<", error)[0]
    said = re.sub(r"at \d+\(\d+\): (failed to compile JSON schema: )?| Enable '.*", "", said)
    return " ".join(said.split())[:300]


def _with_deep_stack(work: Callable[[], T]) -> T:
    """Work in a thread of its own: on a usual stack, a chain of a thousand rules ends the process.

    Raises BackendUnavailable if the system refuses a thread.
    """
    done: list[T] = []
    with _STACK_SIZE:
        before = threading.stack_size(STACK)
        try:
            thread = threading.Thread(target=lambda: done.append(work()), name="isobit grammar")
            thread.start()
        except RuntimeError as error:
            raise BackendUnavailable(f"grammar: {error}") from None
        finally:
            threading.stack_size(before)
    thread.join()
    return done[0]


_STACK_SIZE = threading.Lock()  # it is the whole process's


class _Tokens:
    """A tokenizer as llguidance asks for one."""

    bos_token_id = None

    def __init__(self, grammars: Grammars) -> None:
        tokenizer = grammars.tokenizer
        self._tokenizer = tokenizer
        self.eos_token_id = min(grammars.ends)
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(grammars.special.values())

    def __call__(self, text: bytes | str) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode(errors="replace")
        return self._tokenizer.encode(text, special=False, bos=False)


class _State(Enum):
    """Where an answer is."""

    BEGIN = "begin"
    """Thinking may begin, and so may what is held to the grammar."""
    THINKING = "thinking"
    GAP = "gap"
    """Thinking has ended; an empty line may come first."""
    FREE = "free"
    """Text, until a tag begins a call."""
    HELD = "held"


class Constraint:
    """What one answer may go on with. Nothing of it raises; ``error`` says what went wrong."""

    def __init__(self, grammars: Grammars, grammar: Grammar, matcher: LLMatcher) -> None:
        """``matcher``: of its own."""
        self.grammar = grammar
        self.error = ""
        self._grammars = grammars
        self._matcher = matcher
        self._calls = bool(grammar.call)
        self._opens = grammars.special.get(grammar.opens)
        self._tail = b""
        self._seconds = -FIRST_SECONDS  # of the processor, beyond what its steps may take
        self._state = _State.FREE if self._calls else _State.HELD
        if grammar.thinking:
            self._state = _State.THINKING
        elif grammar.thinking is None and self._opens is not None:
            self._state = _State.BEGIN

    def fresh(self) -> Constraint:
        """Another, for another answer; this one must not have been used."""
        return Constraint(self._grammars, self.grammar, self._matcher.deep_copy())

    @property
    def free(self) -> bool:
        """Whether any token may come."""
        return self._calls and self._state is not _State.HELD

    def fill(self, row: NDArray[np.uint32]) -> None:
        """Set the bits of the tokens that may come: uint32 [ceil(vocabulary / 32)]."""
        if self.free or self._state is _State.THINKING:
            row[:] = 0xFFFFFFFF
            if not self._calls:  # what was asked for is still to come
                for token in self._grammars.ends:
                    row[token // 32] &= ~np.uint32(1 << token % 32)
            return
        begun = time.thread_time()
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        self._seconds += time.thread_time() - begun - STEP_SECONDS
        if self._seconds > 0:
            self.error = self.error or "its steps take too long"
        if self._matcher.is_error() or self.error:
            self.error = self.error or self._matcher.get_error()
            row[:] = 0
            return
        for token in self._beside():
            row[token // 32] |= np.uint32(1 << token % 32)

    def append(self, token: int) -> None:
        """The answer goes on with a token."""
        match self._state:
            case _State.BEGIN:
                if token == self._opens:
                    self._state = _State.THINKING
                elif not self._calls:
                    self._hold([token])
                elif self._grammars.tokenizer.token_bytes(token).strip():
                    self._state = _State.FREE
                    self.append(token)
            case _State.THINKING:
                if (rest := self._after(self.grammar.closes, token)) is not None:
                    self._state = _State.FREE if self._calls else _State.GAP
                    if not self._calls and rest.strip():
                        self._hold(self._grammars.tokens_of(rest))
            case _State.GAP:
                known = self._matcher.validate_tokens([token]) == 1
                self._hold([] if token in self._grammars.blank and not known else [token])
            case _State.FREE:
                rest = self._after(self.grammar.call, token)
                if rest is not None:
                    ids = self._grammars.tokens_of(rest) if rest else []
                    if self._matcher.validate_tokens(ids) == len(ids):  # else it is no call
                        self._hold(ids)
            case _State.HELD:
                self._hold([token])

    def _beside(self) -> Iterable[int]:
        """Tokens that may come though the grammar does not know them."""
        if self._state is _State.BEGIN:
            return () if self._opens is None else (self._opens,)
        return self._grammars.blank if self._state is _State.GAP else ()

    def _hold(self, tokens: Sequence[int]) -> None:
        self._state = _State.HELD
        if tokens and not self._matcher.consume_tokens(list(tokens)):
            self.error = self.error or self._matcher.get_error() or "a token that is not allowed"
        elif self._calls and self._matcher.is_stopped():
            self._matcher.reset()
            self._state = _State.FREE

    def _after(self, tag: str, token: int) -> bytes | None:
        """What follows a tag, if it ends in this token."""
        as_token = self._grammars.special.get(tag)
        if as_token is not None:
            return b"" if token == as_token else None
        found, tail = tag.encode(), self._tail + self._grammars.tokenizer.token_bytes(token)
        at = tail.find(found)
        self._tail = tail[max(len(tail) - len(found) + 1, 0) :] if at < 0 else b""
        return None if at < 0 else tail[at + len(found) :]
