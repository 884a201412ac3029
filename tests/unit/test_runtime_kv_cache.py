"""Pages: handed out once, given back, refused when there are none."""

import numpy as np
import pytest

from isobit.errors import ContextFull
from isobit.numerics import TILE
from isobit.runtime.kv_cache import PagePool, Sequence


def test_a_sequence_grows_page_by_page() -> None:
    pool = PagePool(4)
    with Sequence(pool, context=200) as s:
        positions, pages = s.extend(3)
        assert positions.tolist() == [0, 1, 2]
        assert len(pages) == 1
        positions, pages = s.extend(TILE)
        assert positions[0] == 3
        assert len(pages) == len(set(pages.tolist())) == 2
    assert len(pool.take(4)) == 4


def test_two_sequences_share_no_page() -> None:
    pool = PagePool(6)
    a, b = Sequence(pool, 200), Sequence(pool, 200)
    pages = [*a.extend(130)[1].tolist(), *b.extend(130)[1].tolist()]
    assert len(set(pages)) == 6


def test_a_full_context_says_so_and_takes_nothing() -> None:
    pool = PagePool(2)
    s = Sequence(pool, context=100)
    s.extend(90)
    with pytest.raises(ContextFull, match="101 positions needed, the model was loaded with 100"):
        s.extend(11)
    assert s.extend(10)[0].tolist() == list(range(90, 100))


def test_an_empty_pool_says_so_and_takes_nothing() -> None:
    pool = PagePool(2)
    held = Sequence(pool, 1000)
    held.extend(TILE)
    late = Sequence(pool, 1000)
    with pytest.raises(ContextFull, match="2 more pages"):
        late.extend(TILE + 1)
    assert late.extend(TILE)[1].dtype == np.int32
    held.close()
    assert len(late.extend(TILE)[1]) == 2


def test_closing_twice_gives_pages_back_once() -> None:
    pool = PagePool(3)
    sequence = Sequence(pool, 100)
    sequence.extend(65)
    sequence.close()
    sequence.close()
    assert sorted(pool.take(3)) == [0, 1, 2]
    with pytest.raises(ContextFull):
        pool.take(1)
