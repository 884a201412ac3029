"""Numbers beside the weights (``.scale``): a file that has them against one whose blocks have them
multiplied in, and what is refused."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from isobit.errors import ModelRefused
from isobit.gguf.reader import GGUFFile
from isobit.model.weights import Weights
from tests.helpers import passes
from tests.helpers.passes import run, same_bits
from tests.helpers.synth import Geometry, all_in, write_model

G = Geometry(layers=2, experts=4, hidden=256, ffn=192)
PLAIN = ("attn_q", "attn_k", "attn_output")  # attn_v has none
EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
SHAPES = {
    f"blk.{i}.{role}.scale": (G.experts if role in EXPERTS else 1,)
    for i in range(G.layers)
    for role in (*PLAIN, *EXPERTS)
}


def set_scales(path: Path, scales: dict[str, np.ndarray]) -> None:
    for tensor in gguf.GGUFReader(path, "r+").tensors:
        if tensor.name in scales:
            tensor.data[:] = scales[tensor.name]


def multiply_in(path: Path, scales: dict[str, np.ndarray]) -> None:
    """Q8_0: into d of every block."""
    for tensor in gguf.GGUFReader(path, "r+").tensors:
        scale = scales.get(tensor.name.replace(".weight", ".scale"))
        if scale is not None:
            d = tensor.data.reshape(len(scale), -1, 34)[:, :, :2]
            d[:] = (d.copy().view("<f2") * scale[:, None, None].astype("<f2")).view(np.uint8)


@pytest.mark.parametrize("name", passes.BACKENDS)
def test_a_power_of_two_may_as_well_be_in_the_blocks(name: str, tmp_path: Path, rng) -> None:  # type: ignore[no-untyped-def]
    scales = {k: np.exp2(rng.integers(-1, 2, n)).astype(np.float32) for k, n in SHAPES.items()}
    seed = int(rng.integers(1 << 32))
    beside = write_model(tmp_path / "beside", G, all_in("Q8_0"), seed=seed, extra=SHAPES)
    set_scales(beside, scales)
    within = write_model(tmp_path / "within", G, all_in("Q8_0"), seed=seed)
    unscaled = write_model(tmp_path / "unscaled", G, all_in("Q8_0"), seed=seed)
    multiply_in(within, scales)
    ids = rng.integers(0, G.vocab, 70).tolist()
    logits = []
    for path in (beside, within, unscaled):
        with passes.backend_of(path, name) as backend:
            logits.append(run(backend, ids, chunk=40))
    assert np.isfinite(logits[0]).all()
    assert same_bits(logits[0], logits[1])
    assert not same_bits(logits[0], logits[2])


def test_the_range_of_inputs_changes_nothing(tmp_path: Path, rng) -> None:  # type: ignore[no-untyped-def]
    """``.input_scale``: llama.cpp (October 2026) computes nothing with it on a CPU."""
    ranges = {name.replace(".scale", ".input_scale"): n for name, n in SHAPES.items()}
    ids = rng.integers(0, G.vocab, 20).tolist()
    logits = []
    for extra in ({}, ranges):
        path = write_model(tmp_path / "m", G, all_in("NVFP4"), seed=1, extra=extra)
        with passes.backend_of(path, "cpu") as backend:
            logits.append(run(backend, ids))
    assert same_bits(*logits)


@pytest.mark.parametrize(("name", "planes"), [("cpu", 1), ("cpu", 2), ("wgpu", 2)])
def test_any_scale_is_the_reference_s(name: str, planes: int, tmp_path: Path, rng) -> None:  # type: ignore[no-untyped-def]
    formats = all_in("NVFP4") | {"attn_v": "Q8_0"}
    path = write_model(tmp_path / "m", G, formats, seed=int(rng.integers(1 << 32)), extra=SHAPES)
    set_scales(path, {k: rng.uniform(0.5, 2, n).astype(np.float32) for k, n in SHAPES.items()})
    ids = rng.integers(0, G.vocab, 70).tolist()
    with (
        passes.backend_of(path, "reference", planes) as reference,
        passes.backend_of(path, name, planes) as backend,
    ):
        assert same_bits(run(backend, ids, chunk=40), run(reference, ids))


@pytest.mark.parametrize("shape", [(2,), (5,)])
def test_a_misshapen_scale_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    for name in ("blk.1.attn_k.scale", "blk.1.ffn_up_exps.scale"):
        path = write_model(tmp_path / "m", G, all_in("Q8_0"), extra={name: shape})
        with GGUFFile.open(path) as file, pytest.raises(ModelRefused, match=f"{name}: expected"):
            Weights.from_file(file)
