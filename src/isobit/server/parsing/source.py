"""Text that comes in pieces, read as if it were there: what parsers of answers are written on.

A parser is a generator that yields when it needs more text, so that it reads like one over a whole
text, and gives the same events however the text was cut into pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from typing import TypeVar

T = TypeVar("T")
Parsing = Generator[None, None, T]

BLANK = " \t\r\n"


class Source:
    """The text that has come and was not read yet.

    A tag that is a token of the vocabulary counts only where it came as that token; the same
    characters made of other tokens are text that speaks of tags.
    """

    def __init__(self, special: Collection[str] = ()) -> None:
        """``special``: the tags that are tokens."""
        self.text = ""
        self.ended = False
        self.cut = False
        """Whether it ended where the model would have gone on: what may be the beginning of a tag
        or of a call is then neither text nor a call."""
        self._special = frozenset(special)
        self._marks: set[int] = set()
        self._offset = 0  # of the text, in all that came
        self._kept: list[str] | None = None

    def mark(self, offset: int) -> None:
        """A tag that is a token begins at this offset of all that comes."""
        self._marks.add(offset)

    def take(self, n: int) -> str:
        """Read n characters that are there."""
        taken, self.text = self.text[:n], self.text[n:]
        self._offset += n
        if self._kept is not None:
            self._kept.append(taken)
        return taken

    def keep(self) -> None:
        """What is read from here on can be put back."""
        self._kept = []

    def put_back(self) -> None:
        """Read again from where ``keep`` was called."""
        kept, self._kept = "".join(self._kept or ()), None
        self.text = kept + self.text
        self._offset -= len(kept)

    def peek(self) -> Parsing[str]:
        """The next character, or nothing at the end."""
        while not self.text and not self.ended:
            yield
        return self.text[:1]

    def skip(self, characters: str = BLANK) -> Parsing[None]:
        """Read over any of these characters."""
        while (next_ := (yield from self.peek())) and next_ in characters:
            self.take(len(self.text) - len(self.text.lstrip(characters)))

    def has(self, text: str) -> Parsing[bool]:
        """Whether this comes next."""
        while len(self.text) < len(text) and text.startswith(self.text) and not self.ended:
            yield
        return self.text.startswith(text) and self._is_tag(text, 0)

    def took_beginning(self, tag: str) -> bool:
        """Read all there is, if a tag begins so."""
        begins = self.text != "" and tag.startswith(self.text) and self._is_tag(tag, 0)
        if begins:
            self.take(len(self.text))
        return begins

    def took(self, text: str) -> Parsing[bool]:
        """Read this, if it comes next."""
        found = yield from self.has(text)
        if found:
            self.take(len(text))
        return found

    def line_until(self, end: str, most: int = 512) -> Parsing[str | None]:
        """The text before a character, which is read, too; None if it does not end in time."""
        while (at := self.text.find(end)) < 0:
            if self.ended or len(self.text) > most or "\n" in self.text:
                return None
            yield
        if at > most or "\n" in self.text[:at]:
            return None
        found = self.take(at)
        self.take(len(end))
        return found

    def until(self, tags: Sequence[str], say: Callable[[str], None]) -> Parsing[str | None]:
        """Give out all text before the first of some tags, and read that tag.

        None if the text ends first.
        """
        while True:
            found = min(
                ((at, tag) for tag in tags if (at := self._find(tag)) >= 0),
                default=None,
            )
            if found is not None:
                at, tag = found
                say(self.take(at))
                self.take(len(tag))
                return tag
            whole = len(self.text)
            ends = self.ended and not self.cut
            if text := self.take(whole if ends else min(map(self._safe, tags), default=whole)):
                say(text)
            if self.ended:
                return None
            yield

    def _is_tag(self, tag: str, at: int) -> bool:
        return tag not in self._special or self._offset + at in self._marks

    def _find(self, tag: str) -> int:
        at = self.text.find(tag)
        while at >= 0 and not self._is_tag(tag, at):
            at = self.text.find(tag, at + 1)
        return at

    def _safe(self, tag: str) -> int:
        """So many characters, the first, are not the beginning of a tag that is still to come."""
        for at in range(max(len(self.text) - len(tag) + 1, 0), len(self.text)):
            if tag.startswith(self.text[at:]) and self._is_tag(tag, at):
                return at
        return len(self.text)
