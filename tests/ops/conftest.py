import os

import numpy as np
import pytest

from isobit.gguf.formats import FORMATS

from .backends import OPENERS
from .cases import Sentinels


@pytest.fixture
def rng():
    """Fresh random numbers; ISOBIT_TEST_SEED repeats those of a failed test."""
    seed = int(os.environ.get("ISOBIT_TEST_SEED", np.random.SeedSequence().entropy % (1 << 32)))
    print(f"seed {seed}")
    return np.random.default_rng(seed)


@pytest.fixture(params=OPENERS)
def ops(request):
    """A backend's operations; every result lies between sentinels, checked when the test ends."""
    opened = OPENERS[request.param]()
    sentinels = Sentinels()
    opened.empty = sentinels.empty
    yield opened
    sentinels.check()


@pytest.fixture(params=FORMATS.values(), ids=lambda f: f.name)
def fmt(request):
    return request.param


@pytest.fixture(params=[1, 2], ids=["1-plane", "2-planes"])
def planes(request):
    return request.param
