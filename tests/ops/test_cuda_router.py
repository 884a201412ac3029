"""A router's product and its choice by clusters of blocks give what both give by themselves."""

from contextlib import closing

import numpy as np
import pytest

from isobit.backends.cpu import CpuBackend
from isobit.config import EngineConfig
from isobit.gguf.reader import GGUFFile
from isobit.model.weights import Weights
from tests.helpers.synth import Geometry, write_model

from .cuda_emulator import EmulatedGpu
from .cuda_support import SEED, same, sized
from .test_cuda_rows import Texts, launched


@pytest.mark.parametrize(("experts", "processors", "together"), [(64, 8, True), (32, 2, False)])
def test_choice_by_clusters(tmp_path, experts, processors, together):
    """Tokens of a cluster are fewer than its blocks, or as many; where they would be more, the
    choice is a kernel of its own."""
    print("seed", SEED)
    path = write_model(tmp_path / "m.gguf", Geometry(layers=1, experts=experts), seed=SEED)
    engine, rng = EngineConfig(context=128, max_sequences=7, chunk=16), np.random.default_rng(SEED)
    pages = rng.permutation(14).astype(np.int32).reshape(7, 2)
    gpu = EmulatedGpu(SEED, bulk=True)
    gpu.multiprocessors = processors
    with GGUFFile.open(path) as file:
        weights = Weights.from_file(file)
        ours = sized((), (4, 7))(weights, engine, gpu)
        with closing(CpuBackend(weights, engine)) as theirs:
            texts = Texts(rng, weights.config.vocab, pages, ours, theirs)
            names = launched(ours)
            for n in (4, 7):
                texts.go_on(*((s, 1) for s in range(n)))
            batch = texts.batch([(0, 1), (2, 3)], every=True)
            same(ours.forward(batch), theirs.forward(batch))
            assert ("router" in names) == together
            assert ("router_top_k" in names) != together
