"""The graph of a pass as data: what an architecture writes is checked and can be asked for."""

import numpy as np
import pytest

from isobit.errors import ModelRefused
from isobit.gguf import formats
from isobit.model.graph import Builder, Graph
from isobit.numerics import Weight
from isobit.numerics.ops import Add, Embedding, Heads, MatMul, RmsNorm, SelectRows, TopK


def weight(name: str, *shape: int) -> Weight:
    return Weight(name, formats.F32, shape, np.zeros(4 * int(np.prod(shape)), np.uint8))


def tiny() -> Graph:
    """Two layers, of which the first has a stage more."""
    g = Builder("tiny.gguf")
    x = g.one("embedding", Embedding(), g.tokens, weights=[weight("table", 10, 4)])
    for i in range(2):
        with g.layer(i):
            h = g.one("norm", RmsNorm(1e-6), x, weights=[weight(f"norm.{i}", 4)])
            if i == 0:
                h = g.one("extra", MatMul(), h, weights=[weight("extra", 4, 4)])
            view = g.one(
                None, Heads(0, 2, 2), g.one(None, MatMul(), h, weights=[weight(f"w.{i}", 4, 4)])
            )
            assert view.shape.row == (2, 2)
            x = g.one("residual", Add(), x, h)
    wanted = g.one(None, SelectRows(), x, g.logit_rows)
    return g.graph(g.one("logits", MatMul(), wanted, weights=[weight("table", 10, 4)]))


def test_stages_stand_in_graph_order_and_know_their_inputs() -> None:
    graph = tiny()
    assert list(graph.stages) == [
        ("embedding", None),
        *(("norm", 0), ("extra", 0), ("residual", 0)),
        *(("norm", 1), ("residual", 1)),
        ("logits", None),
    ]
    assert graph.names == ("embedding", "norm", "extra", "residual", "logits")
    assert graph.n_layers == 2
    residual = graph.stages["residual", 1]
    assert [v.key for v in residual.inputs] == [("residual", 0), ("norm", 1)]
    logits = graph.stages["logits", None]
    assert [op.kind for op in logits.ops] == ["select_rows", "matmul"]
    assert logits.value.shape.rows == "R"


def test_weights_can_be_exchanged_by_name() -> None:
    other = weight("w.1", 4, 4)
    changed = tiny().with_weights({"w.1": other})
    assert changed.weights["w.1"] is other
    assert sorted(changed.weights) == ["extra", "norm.0", "norm.1", "table", "w.0", "w.1"]


@pytest.mark.parametrize(
    ("operation", "rows", "said"),
    [
        (MatMul(), (3, 5), "columns of w: expected 4, got 5"),
        (RmsNorm(1e-6), (5,), r"length of w: expected \(4,\), got \(5,\)"),
    ],
)
def test_what_does_not_fit_is_refused(operation, rows, said) -> None:  # type: ignore[no-untyped-def]
    g = Builder("odd.gguf")
    x = g.one("embedding", Embedding(), g.tokens, weights=[weight("table", 10, 4)])
    with g.layer(3), pytest.raises(ModelRefused, match=rf"odd.gguf: .* of layer 3: {said}"):
        g.one("y", operation, x, weights=[weight("w", *rows)])
    with pytest.raises(ModelRefused, match="experts used: expected at most 4, got 5"):
        g.add(("w", "ids"), TopK(5, normalise=True), x)


def test_a_graph_that_reads_what_is_not_there_is_a_mistake() -> None:
    g, other = Builder("a"), Builder("b")
    foreign = other.one("embedding", Embedding(), other.tokens, weights=[weight("table", 10, 4)])
    y = g.one("sum", Add(), foreign, foreign)
    with pytest.raises(AssertionError, match="reads what is not there"):
        g.graph(y)
    g = Builder("a")
    table = [weight("table", 10, 4)]
    x = g.one("embedding", Embedding(), g.tokens, weights=table)
    g.one("embedding", Embedding(), g.tokens, weights=table)
    with pytest.raises(AssertionError, match="two stages named"):
        g.graph(x)
