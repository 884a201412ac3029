"""A model in the child of a fork: the CPU goes on without its threads, others are refused."""

import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest

import isobit
from isobit.backends.reference import ReferenceBackend
from isobit.errors import BackendUnavailable
from isobit.runtime.model import Model

pytestmark = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="not run: no fork"
)
IDS = [1138, 550, 1754, 65, 404, 565, 9, 77]


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with isobit.load("sample", "cpu", threads=2, context=256) as opened:
        opened.logits(IDS)  # the threads run
        yield opened


def in_child(work: Callable[[], Any]) -> Any:
    """What work gives in the child of a fork, which has half a minute for it."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def child(out: Connection) -> None:
        try:
            out.send(work())
        except BaseException as error:
            out.send(error)

    process = context.Process(target=child, args=(theirs,))
    process.start()
    try:
        assert ours.poll(30), "the child hangs"
        return ours.recv()
    finally:
        process.join(5)
        process.kill()


def test_a_child_has_the_bits_and_ends(model: Model) -> None:
    expected = model.logits(IDS)

    def work() -> tuple[bytes, list[int]]:
        logits = model.logits(IDS)
        done = model.generate(IDS, max_tokens=3, temperature=0.8, seed=1, logprobs=2)
        model.close()
        return logits.tobytes(), done.token_ids

    logits, ids = in_child(work)
    assert logits == expected.tobytes()
    again = model.generate(IDS, max_tokens=3, temperature=0.8, seed=1)  # the parent goes on
    assert ids == again.token_ids
    assert np.array_equal(model.logits(IDS), expected)


def test_what_does_not_survive_is_refused(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReferenceBackend, "survives_fork", False)  # as a GPU's context
    with isobit.load("sample", "reference", context=64) as other:
        other.logits([1])
        error = in_child(lambda: other.logits([1]))
        assert isinstance(error, BackendUnavailable)
        assert "forked; load it again" in str(error)
