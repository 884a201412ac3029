"""What cases do not show of wgpu: matrices, stacks and caches divided between buffers, plans."""

from contextlib import contextmanager

import numpy as np
import pytest

from isobit.backends.wgpu.device.layout import Stack
from isobit.backends.wgpu.lowering import Pass
from isobit.backends.wgpu.ops.top_k import SortedPairs
from isobit.numerics.ops import TopK

from .cases.attention import CUTS, attention_of_normed
from .cases.products import experts, matmul_side_by_side
from .harness import Case, check, specified, written
from .ways import WAYS
from .wgpu_support import open_device


@pytest.fixture
def device():
    return open_device()


@contextmanager
def checked(case, way="wgpu"):
    """The backend, after the case was checked on it."""
    wanted, _ = specified(case)
    with WAYS[way](wanted.weights, wanted.engine) as (backend, intact):
        check(case, backend, intact)
        yield backend


@pytest.mark.parametrize("limit", [1 << 30, 9_000])
def test_matrices_side_by_side(device, limit, monkeypatch):
    """q, k and v of other formats, also divided between buffers."""
    monkeypatch.setattr(device, "binding_bytes", limit)
    with checked(Case(matmul_side_by_side, lengths=(5,), cuts=((),))) as backend:
        parts = [len(s.parts) for s in backend._g.matrices[0].segments]
        assert parts == ([3, 1, 2, 2] if limit == 9_000 else [1, 1, 1, 1])


@pytest.mark.parametrize("way", ["wgpu", "wgpu-unfused"])
@pytest.mark.parametrize("kinds", [("Q4_K", "Q4_K", "F16"), ("Q5_0", "Q5_0", "Q8_0")])
def test_a_stack_divided_inside_an_expert(device, monkeypatch, kinds, way):
    of = {"kinds": kinds, "n": 5, "k": 3, "shown": True}
    case = Case(experts, of, (9,), ((),))
    products = [op for op in written(case).weights.graph.ops if op.kind == "expert_matmul"]
    weights = [op.weights[0] for op in products]
    stack = Stack(tuple(weights[: 2 if way == "wgpu" else 1]))
    monkeypatch.setattr(device, "binding_bytes", stack.row_block_bytes * (2 * stack.row_blocks - 1))
    with checked(case, way) as backend:
        assert len(backend._g.matrices[-4 if way == "wgpu-unfused" else -3].segments[0].parts) == 3


@pytest.mark.parametrize(
    ("size", "heads", "kv_heads", "together"),
    [(128, 4, 2, 2), (80, 3, 1, 1), (10, 4, 4, 3), (512, 2, 1, 1)],
)
def test_a_cache_divided_by_heads(device, monkeypatch, size, heads, kv_heads, together):
    """So many key-value heads share a buffer; tokens take several passes and portions."""
    of = {"size": size, "heads": heads, "kv_heads": kv_heads}
    case = Case(attention_of_normed, of, (140, 5), CUTS)
    pages = written(case).engine.pages
    page = 4 * (256 * -(-size // 4) + 128)
    monkeypatch.setattr(device, "binding_bytes", pages * page * together)
    with checked(case) as backend:
        (cache,) = set(backend._g.caches.values())
        assert cache.parts[0].heads == together
        assert sum(part.heads for part in cache.parts) == kv_heads


def test_plan_holds_every_pair_once(device):
    """Many tokens, uneven experts: groups of at most 8 items, all of one expert."""
    tokens, n, k = 300, 40, 4

    def uneven(g):
        z = g.given(g.rng.standard_normal((tokens, n)) + np.linspace(0, 4, n))
        return g.add(("shares", "ids"), TopK(k, normalise=True), z)[0]

    case = Case(uneven, {}, (tokens,), ((),))
    with checked(case) as backend:
        (op,) = (op for op in specified(case)[0].weights.graph.ops if op.kind == "top_k")
        ids = op.outputs[1]
        at = SortedPairs.of(ids, Pass(tokens, 1, 1))
        words = device.read(backend._g.places[ids].slot.buffer, np.int32, 5 * tokens * k)
    groups = words[at.groups_at : at.groups_at + 3 * at.groups].reshape(-1, 3)
    found = []
    for expert, first, count in groups:
        assert 0 <= count <= 8
        items = words[first : first + count]
        assert (words[items] == expert).all()
        found += items.tolist()
    assert sorted(found) == list(range(tokens * k))
