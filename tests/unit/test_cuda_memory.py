"""The CUDA backend's plan of the device's memory, in numbers; no device needed."""

import numpy as np
import pytest

from isobit.backends.cuda.steps.programs import planned
from isobit.config import EngineConfig
from isobit.errors import BackendUnavailable
from isobit.gguf import formats
from isobit.model.architectures import qwen3
from isobit.model.weights import Weights
from isobit.numerics import Weight
from tests.helpers.geometries import QWEN3_30B_A3B, AnyTensors
from tests.helpers.synth import Q4_K_M

FILE = 18_556_681_408  # Q4_K_M
CARD = 24_564 << 20  # what a card of 24 GB has
SIX_BIT = {i for i in range(48) if i < 6 or i >= 42 or (i - 6) % 3 == 2}
"""Layers whose attn_v and ffn_down are Q6_K, as llama-quantize chooses them."""


class Card:
    """The plain facts of a device."""

    multiprocessors = 128
    shared_most = 99 << 10
    cache_bytes = 72 << 20
    warpgroups = False

    def memory(self):
        return CARD, CARD


class NoBytes(AnyTensors):
    """The tensors of the large model, without their bytes."""

    def take(self, name, *shape):
        role = name.removesuffix(".weight").split(".")[-1].removesuffix("_exps")
        fmt = "F32" if len(shape) == 1 else Q4_K_M.get(role, "Q4_K")
        if role in ("attn_v", "ffn_down") and int(name.split(".")[1]) not in SIX_BIT:
            fmt = "Q4_K"
        return Weight(name, getattr(formats, fmt), shape, np.empty(0, np.uint8))


@pytest.fixture(scope="module")
def weights():
    return Weights(QWEN3_30B_A3B, qwen3.graph(QWEN3_30B_A3B, NoBytes()))


def plan_of(weights, **engine):
    return planned(weights, EngineConfig(**engine), Card())


def test_30b_with_16k_positions_fits_on_24_gb(weights):
    plan = plan_of(weights, context=16384, max_sequences=1)
    assert plan.total <= 0.95 * CARD
    assert plan.weights + plan.workspace <= 1.05 * FILE
    needed = sum(n for _, n in plan.parts)
    plan.check(needed, CARD)
    with pytest.raises(BackendUnavailable):  # what is free counts, not what there is
        plan.check(needed - 1, CARD)


def test_what_does_not_fit_is_refused_with_the_arithmetic(weights):
    plan = plan_of(weights, context=40960, max_sequences=8)
    with pytest.raises(BackendUnavailable) as refusal:
        plan.check(25_000_000_000, CARD)
    words = str(refusal.value)
    assert f"= {plan.total / 1e9:.2f} GB" in words
    assert "25.00 of 25.76 GB are free" in words
    assert "a smaller --context or fewer sequences" in words
