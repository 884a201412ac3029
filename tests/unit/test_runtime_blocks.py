"""Pages: shared by exact text, kept when nobody holds them, taken the longest unused first."""

import numpy as np
import pytest

from isobit.errors import ContextFull
from isobit.numerics import KV_PAGE
from isobit.runtime.blocks import Blocks, PageTable


def text(n_pages: int, first: int = 0) -> list[int]:
    return list(range(first, first + KV_PAGE * n_pages))


def written(blocks: Blocks, ids: list[int], salt: str | None = "") -> PageTable:
    """A table whose pages hold all of a text."""
    table = blocks.open(ids, salt)
    blocks.extend(table, -(-len(ids) // KV_PAGE) - len(table.pages))
    blocks.publish(table, ids, len(ids))
    return table


def test_a_text_is_found_by_who_begins_alike() -> None:
    blocks = Blocks(10)
    first = written(blocks, text(3))
    second = blocks.open([*text(2), *text(1, first=500)])
    assert second.pages == first.pages[:2]
    assert (blocks.held, blocks.cached, blocks.free) == (3, 0, 7)
    blocks.close(first)
    assert (blocks.held, blocks.cached, blocks.free) == (2, 1, 7)
    blocks.check([second])
    blocks.close(second)
    assert (blocks.held, blocks.cached, blocks.free) == (0, 3, 7)
    assert len(blocks.open(text(3)).pages) == 3


def test_a_page_is_its_own_text_and_all_before_it() -> None:
    blocks = Blocks(10)
    written(blocks, text(2))
    assert blocks.open([*text(1, first=1), *text(1, first=KV_PAGE)]).pages == []
    changed = text(2)
    changed[KV_PAGE + 5] += 1
    assert len(blocks.open(changed).pages) == 1
    assert len(blocks.open(text(2)[: 2 * KV_PAGE - 1]).pages) == 1  # part of a page is none


def test_salts_share_nothing() -> None:
    blocks = Blocks(10)
    tables = [written(blocks, text(1), salt) for salt in ("", "a", "b", None, None)]
    assert len({t.pages[0] for t in tables}) == 5
    assert [len(blocks.open(text(1), salt).pages) for salt in ("", "a", "c", None)] == [1, 1, 0, 0]
    blocks.close(tables[3])
    assert blocks.free == 6  # what nobody can find is not kept


def test_the_same_text_computed_twice_is_kept_once() -> None:
    blocks = Blocks(10)
    tables = [PageTable(""), PageTable("")]
    for table in tables:
        blocks.extend(table, 2)
    for table in tables:
        blocks.publish(table, text(2), 2 * KV_PAGE)
    assert tables[0].pages == tables[1].pages
    assert (blocks.held, blocks.free) == (2, 8)
    blocks.check(tables)


def test_the_longest_unused_end_is_taken_first() -> None:
    blocks = Blocks(4)
    long, short = written(blocks, text(3)), written(blocks, text(1, first=900))
    pages = list(long.pages)
    blocks.close(long)
    blocks.close(short)
    table = PageTable(None)
    blocks.extend(table, 2)
    assert set(table.pages) == set(pages[1:])  # the ends of the text that was given up first
    assert len(blocks.open(text(3)).pages) == 1
    blocks.extend(table, 1)
    assert blocks.open(text(1, first=900)).pages == []
    with pytest.raises(ContextFull, match="1 more pages of 64 positions needed, 0 of 4 free"):
        blocks.extend(table, 1)


def test_use_makes_a_text_young_again() -> None:
    blocks = Blocks(2)
    for first in (0, 500):
        blocks.close(written(blocks, text(1, first)))
    blocks.close(blocks.open(text(1)))
    table = PageTable(None)
    blocks.extend(table, 1)
    assert len(blocks.open(text(1)).pages) == 1


def test_what_is_held_is_never_taken() -> None:
    blocks = Blocks(3)
    held = written(blocks, text(2))
    table = PageTable(None)
    blocks.extend(table, 1)
    with pytest.raises(ContextFull):
        blocks.extend(table, 1)
    assert not set(table.pages) & set(held.pages)


def test_experts_stay_with_their_page() -> None:
    blocks = Blocks(6)
    routes = [np.full((KV_PAGE, 2, 4), i, np.int16) for i in range(2)]
    table = PageTable("")
    blocks.extend(table, 2)
    blocks.publish(table, text(2), 2 * KV_PAGE, routes)
    blocks.close(table)
    found = blocks.open(text(2), routes=True)
    assert [r[0, 0, 0] for r in blocks.routes(found)] == [0, 1]
    written(blocks, text(3))
    assert len(blocks.open(text(3)).pages) == 3
    assert len(blocks.open(text(3), routes=True).pages) == 2  # of the third they are not known


def test_forgetting_frees_all_but_what_is_held() -> None:
    blocks = Blocks(8)
    held = written(blocks, text(2))
    blocks.close(written(blocks, text(3, first=700)))
    blocks.forget()
    assert (blocks.held, blocks.cached, blocks.free) == (2, 0, 6)
    blocks.check([held])
