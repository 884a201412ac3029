"""Mixed batches whose runs of tokens attention takes together: bits that each token has alone."""

import numpy as np
import pytest

from isobit.backends.cpu import CpuBackend
from isobit.config import EngineConfig
from isobit.gguf.reader import GGUFFile
from isobit.model.weights import Weights
from tests.helpers.seed import SEED
from tests.helpers.synth import Geometry, write_model

from .cuda_support import open_gpu, sized
from .test_cuda_rows import Texts, launched


@pytest.mark.parametrize("kind", ["emulated", "cuda"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "multiprocessors"), [(8, 1, 4), (8, 1, 64), (6, 2, 64)]
)
def test_runs_of_mixed_batches(tmp_path, kind, heads, kv_heads, multiprocessors):
    """Of 2, 16, 17 and more tokens at several depths, several at once, beside single ones and
    padding."""
    print("seed", SEED)
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": 128, "layers": 1}
    path = write_model(tmp_path / "m.gguf", Geometry(**shape), seed=SEED)
    rng, n = np.random.default_rng(SEED), 8
    engine = EngineConfig(context=256, max_sequences=n, chunk=64)
    pages = rng.permutation(4 * n).astype(np.int32).reshape(n, 4)
    gpu = open_gpu(kind)
    if kind == "emulated":
        gpu.warpgroups, gpu.multiprocessors = True, multiprocessors
    with GGUFFile.open(path) as file:
        weights = Weights.from_file(file)
        ours = sized(padded=(8, 20, 48, 64))(weights, engine, gpu)
        theirs = CpuBackend(weights, engine)
        names = launched(ours)
        texts = Texts(rng, weights.config.vocab, pages, ours, theirs)
        texts.go_on((0, 64), (1, 5), every=False)
        names.clear()
        texts.go_on((0, 1), (1, 1), (2, 17))
        texts.go_on((2, 16), (3, 2), (0, 1))
        texts.go_on((0, 1), (1, 1), (2, 60), (3, 2))
        texts.go_on((4, 16), (5, 20), (2, 1), (1, 3))
        texts.go_on((1, 40))
        if ours._gpu.warpgroups:
            assert "attention_wgmma" in names
        ours.close()
        theirs.close()
