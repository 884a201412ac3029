"""Experts over tokens grouped by expert, against one token at a time in the specification."""

import numpy as np
import pytest

from isobit import numerics
from isobit.gguf import formats

from .cases import identical, weight


@pytest.mark.parametrize(("tokens", "k", "experts"), [(1, 4, 16), (7, 2, 5), (40, 3, 4), (3, 1, 1)])
@pytest.mark.parametrize("kinds", ["Q4_K Q4_K Q6_K", "Q5_K Q3_K Q2_K", "Q8_0 Q4_1 Q5_0"])
def test_experts(ops, planes, tokens, k, experts, kinds, rng):
    by_name = {f.name: f for f in formats.FORMATS.values()}
    gate_fmt, up_fmt, down_fmt = (by_name[name] for name in kinds.split())
    hidden, ffn = 512, 256
    gate, up = (
        weight(rng, gate_fmt, experts, ffn, hidden),
        weight(rng, up_fmt, experts, ffn, hidden),
    )
    down = weight(rng, down_fmt, experts, hidden, ffn)
    x = (rng.standard_normal((tokens, hidden)) * 1e-6).astype(np.float32)
    ids = np.stack([rng.permutation(experts)[:k] for _ in range(tokens)]).astype(np.int32)
    got = ops.experts(gate, up, down, x, ids, planes)
    for t in range(tokens):
        for rank, e in enumerate(ids[t].tolist()):
            row = x[t : t + 1]
            g = numerics.matmul(gate.expert(e), row, planes)
            u = numerics.matmul(up.expert(e), row, planes)
            a = numerics.silu_gate(g, u)
            y = numerics.matmul(down.expert(e), a, planes)
            assert np.isfinite(y).all()
            for result, want in zip(got, (g, u, a, y), strict=True):
                identical(result[t, rank], want[0])


def test_combine_follows_rank_order(ops, rng):
    weights = np.float32([[1e8, 1, -1e8]])
    y = np.ones((1, 3, 4), np.float32)
    assert (ops.combine(weights, y) == numerics.combine(weights, y)).all()
    assert (ops.combine(weights, y) != ops.combine(weights[:, [0, 2, 1]], y)).all()
