"""What the model tests share: the sample model, its held-out text and the oracle's run over it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.contracts import PROMPTS, Make
from tests.helpers.synth import Geometry, write_model
from tests.model.accuracy import SAMPLE, TEXT, tokens_of
from tests.model.oracle import Oracle, OracleRun


@pytest.fixture(scope="session")
def heldout() -> list[int]:
    """4,096 tokens the sample model was not trained on: its whole context."""
    return tokens_of(TEXT)[:4096]


@pytest.fixture(scope="session")
def sample_oracle() -> Oracle:
    return Oracle(SAMPLE)


@pytest.fixture(scope="session")
def heldout_run(sample_oracle: Oracle, heldout: list[int]) -> OracleRun:
    """Its first 1,024 tokens."""
    return sample_oracle.run(heldout[:1024])


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, three of eight experts, random weights, for which the prompts of contracts leave
    no choice of experts to a last digit."""
    path, shape = tmp_path_factory.mktemp("model") / "small.gguf", Geometry(experts_used=3)
    while True:
        seed = int(np.random.SeedSequence().generate_state(1)[0])
        print(f"model seed {seed}")
        write_model(path, shape, seed=seed)
        runs = map(Oracle(path).run, json.loads(PROMPTS))
        if min(run.margins.min() for run in runs) > 1e-2:
            return path


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[Make], None]:
    """Puts another backend in the place of the CPU's."""
    return lambda make: monkeypatch.setattr("isobit.backends.cpu.CpuBackend", make)
