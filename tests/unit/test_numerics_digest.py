"""The tree of digests, and its compiled form at every SIMD level."""

import hashlib

import numpy as np
import pytest

from isobit.backends.cpu import _cpu
from isobit.backends.cpu.sampler import RowSampler
from isobit.numerics.digest import PIECE, tree_digest


def sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def test_the_tree_is_made_of_pieces() -> None:
    data = bytes(range(256)) + b"rest"
    assert tree_digest(data[:PIECE]) == sha(data[:PIECE])
    assert tree_digest(data) == sha(sha(data[:PIECE]) + sha(b"rest"))
    pieces = [bytes([i]) * PIECE for i in range(9)]  # nine digests are more than a piece
    eight, ninth = b"".join(map(sha, pieces[:8])), sha(pieces[8])
    assert tree_digest(b"".join(pieces)) == sha(sha(eight) + sha(ninth))


@pytest.mark.parametrize("simd", _cpu.simd_levels())
def test_compiled(simd: str, rng: np.random.Generator) -> None:
    sampler = RowSampler(simd, threads=2)
    edges = [1, 3, 55, 56, 63, 64, 65, 119, 120, 128, 255, 256, 257, 511, 2048, 2049, 16 * 256]
    for n in [*edges, *rng.integers(1, 20000, 6).tolist(), 4 * 151936]:
        rows = rng.integers(0, 256, (3, n), dtype=np.uint8)
        expected = [tree_digest(row.tobytes()) for row in rows]
        assert [d.tobytes() for d in sampler.digests(rows)] == expected, n
