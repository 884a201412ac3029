"""One generation on every backend: the experts, the most likely tokens, a receipt that replays."""

from collections.abc import Iterator

import numpy as np
import pytest

from isobit.backend_names import BACKENDS
from isobit.config import EngineConfig
from isobit.errors import BackendUnavailable
from isobit.runtime.model import Model
from isobit.verify.receipt import Recorder, replay
from tests.helpers.expected import not_run

PROMPT = [1138, 550, 1754, 65, 404]
SETTINGS = {"max_tokens": 6, "temperature": 0.8, "seed": 3}
ENGINE = EngineConfig(context=128, max_sequences=2)


def recorded(model: Model) -> Recorder:
    recorder = Recorder()
    model.generate(PROMPT, **SETTINGS, watch=recorder)
    return recorder


@pytest.fixture(scope="module")
def on_cpu_model() -> Iterator[Model]:
    with Model("sample", "cpu", ENGINE) as model:
        yield model


@pytest.mark.parametrize("name", [n for n in BACKENDS if n != "cpu"])
def test_a_generation_is_the_cpus(on_cpu_model: Model, name: str) -> None:
    expected = recorded(on_cpu_model)
    try:
        model = Model("sample", name, ENGINE)
    except BackendUnavailable as error:
        not_run(name, str(error))
    with model:
        found = recorded(model)
        (ids, experts), (expected_ids, expected_experts) = found.routes(), expected.routes()
        assert ids.tolist() == expected_ids.tolist()
        assert np.array_equal(experts, expected_experts)
        argmax = model.logits(ids.tolist()).argmax(-1)
        assert np.array_equal(argmax, on_cpu_model.logits(ids.tolist()).argmax(-1))
        assert found.receipt().tokens == expected.receipt().tokens
        assert replay(expected.receipt(), model) is None
        assert replay(found.receipt(), on_cpu_model) is None
