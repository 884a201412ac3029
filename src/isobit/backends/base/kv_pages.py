"""How large a KV cache a model gets: as many pages as its sequences can fill, or as there is room
for, and then the line that says so."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf

from isobit import machine
from isobit.config import MOST_PAGES, EngineConfig
from isobit.errors import BackendUnavailable, UsageError
from isobit.model.graph import zero_state
from isobit.model.weights import Weights
from isobit.numerics import KV_PAGE
from isobit.numerics.ops import Append

_LEAST = 4
"""Pages; a context that nobody has named does not become shorter."""
_EACH = 64
"""Pages; so much of its context each of ``most_sequences`` can have."""


@dataclass(frozen=True)
class Headroom:
    """What a device has, and a model takes of it, in bytes."""

    free: float
    """For the KV cache, once all else is there; infinite where nobody says."""
    page: int
    """A page of the KV cache, all layers."""
    most: float = inf
    """Pages, however much is free."""

    @property
    def pages(self) -> float:
        """So many have room."""
        return self.most if self.free == inf else min(self.free // max(self.page, 1), self.most)


def fit_kv_cache(
    weights: Weights, engine: EngineConfig, headroom: Callable[[EngineConfig], Headroom]
) -> tuple[EngineConfig, str | None]:
    """The settings with a context and a number of pages for which there is room, and, if that is
    less than was asked for, a line that says so.

    A context, or a number of pages, that the caller has named is kept, or refused with
    BackendUnavailable; the model's own, and room for all sequences at full length, give way.
    ``headroom`` is asked with both.
    """
    asked = engine.context or weights.config.context_length
    whole = -(-asked // KV_PAGE)
    have = None
    if engine.most_sequences is not None:
        engine, have = _with_more(engine, engine.most_sequences, asked, headroom)
    pages = engine.pages or min(whole * engine.max_sequences, MOST_PAGES)
    if engine.pages is not None and pages < whole and engine.context is not None:
        raise UsageError(
            f"context: expected at most {pages * KV_PAGE:,} tokens (the KV cache), got {asked:,}"
        )
    have = have or headroom(replace(engine, context=asked, pages=pages))
    fits = int(max(min(pages, have.pages), 0))
    left = min(max(have.free, 0), have.most * have.page)
    lacks = f"{pages * KV_PAGE:,} tokens take {have.page * pages / 1e9:.2f} GB, "
    lacks += f"{left / 1e9:.2f} GB are left for them"
    kept = whole if engine.context is not None else min(whole, _LEAST)
    kept = kept if engine.pages is None else pages
    if fits < kept:
        raise BackendUnavailable(
            f"KV cache: {lacks}; a context of {fits * KV_PAGE:,} has room (--context, --cache)"
        )
    chosen = replace(engine, context=min(asked, fits * KV_PAGE), pages=fits)
    if fits < whole:
        why = lacks if fits < pages else "as long as the KV cache"
        return chosen, f"context: {fits * KV_PAGE:,} tokens, not the model's {asked:,}: {why}"
    if fits < pages:
        many = f"{engine.max_sequences} sequences of up to {asked:,}"
        return chosen, f"KV cache: {fits * KV_PAGE:,} tokens for {many}: {lacks}"
    return chosen, None


def _with_more(
    engine: EngineConfig, most: int, context: int, headroom: Callable[[EngineConfig], Headroom]
) -> tuple[EngineConfig, Headroom]:
    """As many sequences, from ``max_sequences`` to so many, as have room for 4,096 tokens each; and
    a KV cache for all of these, of half of what is free if that of the fewest takes less."""
    least, whole, n = engine.max_sequences, -(-context // KV_PAGE), most
    engine = replace(engine, most_sequences=None)
    pages = engine.pages or min(whole * least, MOST_PAGES)
    while True:
        n = max(n, least)
        have = headroom(replace(engine, context=context, pages=pages, max_sequences=n))
        if have.free == inf:  # nobody says
            return engine, have
        fits = int(max(have.pages, 0))
        if n == least or n * min(whole, _EACH) <= (engine.pages or fits):
            break
        n //= 2
    engine = replace(engine, max_sequences=n)
    if engine.pages is None and pages <= fits:
        pages = max(pages, min(n * whole, fits // 2, MOST_PAGES))
        engine = replace(engine, pages=pages)
    return engine, have


def host_headroom(weights: Weights, engine: EngineConfig) -> Headroom:
    """The host's memory. Weights are mapped: where they do not fit beside the KV cache they are
    read again and again, so that a quarter of what is free is left to it."""
    free = 0.9 * machine.free_memory()
    taken = sum(w.data.nbytes for w in weights.graph.weights.values())
    states = sum(s.nbytes for op in weights.graph.ops for s in zero_state(op))
    return Headroom(
        max(free - taken, free / 4) - engine.max_sequences * states, page_bytes(weights)
    )


def page_bytes(weights: Weights) -> int:
    """A page of all layers: of each vector 16-bit integers, to a multiple of 16, and a scale."""
    vectors = [
        v.shape.row
        for op in weights.graph.ops
        if isinstance(op.operation, Append)
        for v in op.inputs
    ]
    return sum(KV_PAGE * heads * (2 * (-(-width // 16) * 16) + 4) for heads, width in vectors)
