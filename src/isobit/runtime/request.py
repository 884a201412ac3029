"""What was asked of a model, and how far it has got."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from isobit.numerics import KV_PAGE
from isobit.runtime.blocks import PageTable


class State(Enum):
    """A request's life, in order."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """Tokens to run, and more to generate from them.

    There is no phase of prompt and phase of generating: tokens are known, first the prompt's and
    then those generated, and computed tokens catch up with them.
    """

    prompt: Sequence[int]
    max_tokens: int
    """Most tokens to generate; 0 only runs the prompt."""
    salt: str | None = ""
    """Requests share cached pages with those of the same salt; None with nobody."""
    wanted: Sequence[int] = ()
    """Positions of the prompt whose logits are wanted, ascending, beside those that tokens are
    chosen from."""
    routes: bool = False
    """Whether the experts of each token are wanted."""

    tokens: list[int] = field(init=False)
    """Known tokens."""
    drafts: list[int] = field(default_factory=list, init=False)
    """Guesses of what follows them, to be verified in the next pass."""
    computed: int = field(default=0, init=False)
    """So many tokens, the first, have their keys and values in the cache."""
    cached: int = field(default=0, init=False)
    """So many of them were there when the request began to run."""
    flying: int = field(default=0, init=False)
    """So many more are in the pass that runs, while the one after it is scheduled …"""
    coming: int = field(default=0, init=False)
    """… and so many tokens that one will give."""
    table: PageTable = field(init=False)
    state: State = field(default=State.WAITING, init=False)

    def __post_init__(self) -> None:
        """Begin with the prompt."""
        self.tokens = list(self.prompt)
        self.table = PageTable(self.salt)

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - len(self.prompt)

    @property
    def reached(self) -> int:
        """Tokens that are computed once the pass that runs has ended."""
        return self.computed + self.flying

    @property
    def known(self) -> int:
        """Tokens that are known then."""
        return len(self.tokens) + self.coming

    @property
    def behind(self) -> int:
        """Tokens that are known then and not computed; none, if it has all that were asked for."""
        known = len(self.tokens) + self.coming
        if self.coming and known == len(self.prompt) + self.max_tokens:
            return 0
        return known - self.computed - self.flying

    @property
    def pages_needed(self) -> int:
        """Pages that it holds at its longest; the last token that is generated is not run."""
        return -(-(len(self.prompt) + max(self.max_tokens - 1, 0)) // KV_PAGE)

    @property
    def reusable(self) -> int:
        """So many tokens of the prompt need not be run if they are cached."""
        first = self.wanted[0] if self.wanted else len(self.prompt) - 1
        return min(first, len(self.prompt) - 1)
