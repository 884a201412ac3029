"""Thinking, told apart from the answer by tags, and by what the prompt ends with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from isobit.server.parsing.source import BLANK, Parsing, Source
from isobit.text.prompt import THINKING

if TYPE_CHECKING:
    from isobit.server.parsing.reading import Events


@dataclass(frozen=True)
class Thinking:
    """The tags of a model, and whether its answer begins with thinking."""

    opens: str
    closes: str
    begun: bool | None
    """Whether the prompt ends within thinking; None: the answer may begin it."""

    def read(self, source: Source, out: Events) -> Parsing[None]:
        """Thinking to its end, if there is any."""
        if not self.begun:
            source.keep()
            yield from source.skip()
            if self.begun is False or not (yield from source.took(self.opens)):
                if not (source.cut and self.begun is None and source.took_beginning(self.opens)):
                    source.put_back()
                return
        out.begin_thinking()
        if (yield from source.until((self.closes,), out.think)) is not None:
            out.end_thinking()


def found(template: str, prompt: str) -> Thinking | None:
    """How the model of a template thinks, when the text of its prompt is this; None: not at all."""
    for opens, closes in THINKING:
        if closes in template:
            ending = prompt.rstrip(BLANK)
            if ending.endswith(opens):
                return Thinking(opens, closes, begun=True)
            if ending.endswith(closes):
                return Thinking(opens, closes, begun=False)
            return Thinking(opens, closes, begun=None)
    return None
