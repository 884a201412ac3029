"""The text of tokens as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from isobit.errors import ModelRefused
from isobit.text.tokenizer import StreamDecoder, Tokenizer


class TokenText:
    """The text of tokens as they come."""

    notes: tuple[str, ...] = ()
    ids_alone = False

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._special = tokenizer.vocabulary.control | tokenizer.vocabulary.user_defined
        decoder = StreamDecoder(tokenizer)
        self.push, self.flush = decoder.push, decoder.flush

    def ids_of(self, stop: Sequence[str]) -> set[int]:
        """The special tokens that stop strings are the text of."""
        return {self._special[s] for s in stop if s in self._special}


class NoText:
    """For a model without a tokenizer, and token ids as the prompt."""

    ids_alone = True

    def __init__(self, reason: ModelRefused) -> None:
        self.notes = (f"no text: {reason}",)

    def push(self, _token: int) -> str:
        """Nothing."""
        return ""

    def flush(self) -> str:
        """What was held until the end."""
        return ""

    def ids_of(self, _stop: Sequence[str]) -> set[int]:
        """None: there is no text to compare with."""
        return set()


class StopText:
    """Holds text back while it might be the beginning of a stop string.

    Each character moves every stop string's match on by one or back to its longest border (Knuth,
    Morris, Pratt), so that the work is linear in the text however long the strings are.
    """

    def __init__(self, stop: list[str]) -> None:
        self._stop = [(s, _borders(s)) for s in stop if s]
        self._matched = [0] * len(self._stop)  # characters of each at the end of what came
        self._held: list[str] = []
        self._length = 0  # of all that is held
        self._sent: list[str] = []
        self.stopped = False
        self.stop = ""
        """The stop string that was found."""

    @property
    def strings(self) -> list[str]:
        """The stop strings."""
        return [s for s, _ in self._stop]

    def fresh(self) -> StopText:
        """One for another text, and the same stop strings."""
        other = StopText([])
        other._stop, other._matched = self._stop, [0] * len(self._stop)
        return other

    @property
    def all(self) -> str:
        """What was given out so far."""
        return "".join(self._sent)

    def push(self, text: str) -> str:
        """More text came; what of it, and of what was held, is certain."""
        if self.stopped:
            return ""
        if not self._stop:
            self._sent.append(text)
            return text
        for end, character in enumerate(text, start=1):
            whole = 0  # the longest string that is complete begins first
            for k, (s, borders) in enumerate(self._stop):
                n = self._matched[k]
                while n and s[n] != character:
                    n = borders[n - 1]
                self._matched[k] = n = n + (s[n] == character)
                if n == len(s) > whole:
                    whole, self.stop = n, s
            if whole:
                self.stopped = True
                self._hold(text[:end])
                return self._send(whole)
        self._hold(text)
        return self._send(max(self._matched, default=0))

    def flush(self) -> str:
        """What was held until the end."""
        return self._send(0)

    def _hold(self, text: str) -> None:
        self._held.append(text)
        self._length += len(text)

    def _send(self, keep: int) -> str:
        """What is held but for the last ``keep`` characters."""
        n = self._length - keep
        if n <= 0:
            return ""
        held = "".join(self._held)
        self._held, self._length = [held[n:]], keep
        self._sent.append(held[:n])
        return held[:n]


def _borders(s: str) -> list[int]:
    """For each beginning of s, how long its longest border is: an end that is its beginning."""
    borders, n = [0] * len(s), 0
    for i in range(1, len(s)):
        while n and s[i] != s[n]:
            n = borders[n - 1]
        n += s[i] == s[n]
        borders[i] = n
    return borders
