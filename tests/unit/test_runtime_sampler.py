"""A sequence's sampler: seeds, penalties, and the settings that are refused."""

import numpy as np
import pytest

from isobit.backends.base.draws import OCCURRED
from isobit.backends.cpu.sampler import RowSampler
from isobit.errors import ModelRefused, UsageError
from isobit.runtime.grammar import Grammar
from isobit.runtime.sampler import BatchSampler, Sampler, Sampling
from tests.helpers import naive


@pytest.fixture
def logits(rng: np.random.Generator) -> np.ndarray:
    return (rng.standard_normal(500) * 3).astype(np.float32)


@pytest.fixture
def rows() -> RowSampler:
    return RowSampler()


def tokens(sampler: Sampler, logits: np.ndarray, rows: RowSampler, n: int = 100) -> list[int]:
    out = []
    for _ in range(n):
        out.append(sampler.choose(logits, rows))
        sampler.append(out[-1])
    return out


def test_greedy_takes_the_lowest_of_equals(logits: np.ndarray, rows: RowSampler) -> None:
    logits[[7, 3, 400]] = 50
    assert Sampler(Sampling()).choose(logits, rows) == 3


def test_a_draw_depends_on_seed_and_place_alone(logits: np.ndarray, rows: RowSampler) -> None:
    sampling = Sampling(temperature=1.0, seed=5)
    first = tokens(Sampler(sampling), logits, rows)
    assert first == tokens(Sampler(sampling), logits, rows)
    assert first != tokens(Sampler(Sampling(temperature=1.0, seed=6)), logits, rows)
    other = Sampler(sampling)
    for token in (3, 1, 4):  # what came before does not matter, only how much
        other.append(token)
    assert other.choose(logits, rows) == first[3]


def test_choices_have_seeds_of_their_own(logits: np.ndarray, rows: RowSampler) -> None:
    second = Sampler(Sampling(temperature=1.0, seed=5), choice=1)
    assert second.seed == 6
    alone = Sampler(Sampling(temperature=1.0, seed=6))
    assert tokens(second, logits, rows) == tokens(alone, logits, rows)
    assert Sampler(Sampling(seed=-1)).seed == 2**64 - 1
    assert Sampler(Sampling(seed=-1), choice=1).seed == 0


def test_several_sequences_choose_as_each_alone(logits: np.ndarray, rows: RowSampler) -> None:
    settings = [
        Sampling(),
        Sampling(temperature=1.0, seed=1),
        Sampling(temperature=0.7, top_p=0.9, repeat_penalty=1.3, seed=-3),
        Sampling(temperature=1.2, presence_penalty=0.5, frequency_penalty=0.2, seed=9),
        Sampling(logit_bias=((4, 100.0),)),
    ]
    together = [Sampler(s, [1, 2, 3]) for s in settings]
    alone = [Sampler(s, [1, 2, 3]) for s in settings]
    for _ in range(20):
        logits5 = np.stack([logits] * 5)
        found = BatchSampler(together, len(logits)).choose(RowSampler(threads=2), logits5)
        for a, b, token in zip(together, alone, found, strict=True):
            assert b.choose(logits, rows) == token
            a.append(int(token))
            b.append(int(token))
    assert found[4] == 4


def test_the_document_with_penalties(logits: np.ndarray, rows: RowSampler) -> None:
    s = Sampling(0.8, 40, 0.9, 0.01, 1.2, 7, 0.3, 0.1, ((5, 2.0), (6, -2.0)))
    prompt = np.argsort(-logits)[:4].tolist()
    sampler, generated = Sampler(s, prompt), []
    f = np.float32
    for t in range(1, 30):
        z = list(logits)
        z[5], z[6] = z[5] + f(2), z[6] - f(2)
        for i in {*prompt, *generated}:
            z[i] = z[i] / f(1.2) if z[i] > 0 else z[i] * f(1.2)
        for i in set(generated):
            z[i] = (z[i] - f(0.1) * f(generated.count(i))) - f(0.3)
        kept = naive.kept([float(v) for v in z], 0.8, 40, 0.9, 0.01)
        expected = naive.draw(kept, naive.philox(7, t))
        assert sampler.choose(logits, rows) == expected
        sampler.append(expected)
        generated.append(expected)


def test_what_occurred_is_counted(rng: np.random.Generator) -> None:
    """Over more ids than there was room for, some with a bias: the last that an id has."""
    biases = tuple(
        (int(i), float(b)) for i, b in zip(rng.integers(0, 90, 50), range(50), strict=True)
    )
    prompt, generated = rng.integers(0, 300, 40).tolist(), rng.integers(0, 300, 400).tolist()
    for repetition in (1.0, 1.5):
        sampling = Sampling(repeat_penalty=repetition, frequency_penalty=0.5, logit_bias=biases)
        sampler = Sampler(sampling, prompt)
        for n, token in enumerate([*generated, None]):
            if n % 57 == 0 or token is None:
                assert sampler.adjusted is not None
                ids = sampler.adjusted.ids
                there = {*generated[:n], *(prompt if repetition != 1 else ())}
                assert sorted(ids["id"].tolist()) == sorted(there | dict(biases).keys())
                for draw, id, bias, seen in ids.tolist():
                    assert draw == sampler.adjusted.draw
                    assert bias == dict(biases).get(id, 0)
                    assert seen == generated[:n].count(id) + OCCURRED * (id in there)
                sampler.adjusted.number(n)
            if token is not None:
                sampler.append(token)


def test_repetition_sees_the_prompt_and_the_others_do_not(rows: RowSampler) -> None:
    logits = np.array([4.0, 3.0, -1.0], np.float32)
    assert Sampler(Sampling(repeat_penalty=2.0), [0]).choose(logits, rows) == 1
    for penalty in ({"presence_penalty": 2.0}, {"frequency_penalty": 2.0}):
        sampler = Sampler(Sampling(**penalty), [0, 0, 0])  # type: ignore[arg-type]
        assert sampler.choose(logits, rows) == 0
        sampler.append(0)
        assert sampler.choose(logits, rows) == 1
    assert logits[0] == 4.0  # the caller's array is left alone


class Allowing:
    """A constraint that allows some ids."""

    grammar, free, error = Grammar(""), False, "too complex"

    def __init__(self, *ids: int) -> None:
        self.ids = ids

    def fill(self, row: np.ndarray) -> None:
        row[:] = 0
        for i in self.ids:
            row[i // 32] |= np.uint32(1 << i % 32)


def test_what_is_not_allowed_is_not_chosen(logits: np.ndarray, rows: RowSampler) -> None:
    def choices(*constraints: Allowing | None) -> list:
        samplers = [
            Sampler(Sampling(t, top_p=0.1, seed=4, grammar=c and c.grammar), constraint=c)
            for c in constraints
            for t in (0.0, 2.0)
        ]
        several = np.stack([logits] * len(samplers))
        return BatchSampler(samplers, len(logits)).choose(rows, several)

    free = choices(None)
    assert choices(Allowing(103), None) == [103, 103, *free]
    *nothing, first, second = choices(Allowing(), None)
    assert [first, second] == free
    assert [str(error) for error in nothing] == ["grammar: too complex"] * 2
    with pytest.raises(UsageError, match="compiled"):
        Sampler(Sampling(grammar=Grammar("x")))


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused(
    wrong: float, logits: np.ndarray, rows: RowSampler
) -> None:
    logits[77] = wrong
    with pytest.raises(ModelRefused, match="finite"):
        Sampler(Sampling()).choose(logits, rows)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1.0},
        {"temperature": 1e-300},
        {"temperature": float("nan")},
        {"temperature": "1"},
        {"top_k": -1},
        {"top_k": 1 << 31},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"top_k": 2.5},
        {"repeat_penalty": 0.0},
        {"repeat_penalty": 1e-50},
        {"presence_penalty": float("inf")},
        {"frequency_penalty": 1e7},
        {"logit_bias": ((1, float("nan")),)},
        {"seed": 1.5},
        {"seed": -(1 << 63) - 1},
        {"seed": 1 << 64},
    ],
)
def test_refused(settings: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        Sampling(**settings)  # type: ignore[arg-type]
