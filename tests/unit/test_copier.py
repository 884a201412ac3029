"""Copies by threads of the extension."""

import numpy as np
import pytest

from isobit.backends.cpu._cpu import Copier


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_copies_are_whole_once_waited_for(threads, rng):
    """Rows that lie together and apart, many at a time, waited for in any order."""
    copier = Copier(threads)
    source = rng.integers(0, 256, (50, 4001), np.uint8)
    parts = []
    for _ in range(200):
        rows = np.sort(rng.integers(0, 51, 2))
        columns = np.sort(rng.integers(0, 4002, 2))
        part = source[slice(*rows), slice(*columns)]
        to = np.zeros(part.size, np.uint8)
        parts.append((copier.begin(to, part), to, part))
    for i in rng.permutation(len(parts)):
        number, to, part = parts[i]
        copier.wait(number)
        assert np.array_equal(to.reshape(part.shape), part)
    copier.close()
    with pytest.raises(ValueError, match="no such copy"):
        copier.wait(len(parts))


def test_what_does_not_fit_is_refused():
    copier = Copier(1)
    source = np.zeros((2, 8), np.uint8)
    with pytest.raises(ValueError, match="as many bytes"):
        copier.begin(np.zeros(15, np.uint8), source)
    with pytest.raises(ValueError, match="in one piece"):
        copier.begin(np.zeros(8, np.uint8), source[:, ::2])
