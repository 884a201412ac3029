"""Model files of random weights, piece by piece, their tensors under transformers' names, and what
every architecture's file must pass."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from isobit.backends.reference import ReferenceBackend
from isobit.config import EngineConfig
from isobit.errors import ModelRefused
from isobit.gguf.reader import GGUFFile
from isobit.model.architectures import read_config
from isobit.model.parallel.split import split
from isobit.model.weights import Weights
from isobit.numerics.ops import Array
from isobit.verify.forward import Run
from isobit.verify.oracle import Oracle
from tests.helpers.expected import needs
from tests.helpers.passes import opened, run, run_cut, same_bits
from tests.helpers.random_file import F32, RandomFile
from tests.helpers.synth import Geometry
from tests.model.test_split import Meeting, passes

CUTS = [0], [0, 1, 2, 31, 64, 65]
Made = tuple[str, GGUFFile, dict[str, F32]]
"""A kind of model, its file, and its weights as the file holds them."""


def made(kinds: Iterable[str], write: Callable[[Path, str], dict[str, F32]]) -> Any:
    """The fixture ``made`` of a module: its kinds, written."""

    @pytest.fixture(scope="module", params=list(kinds))
    def written(
        request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[Made]:
        path = tmp_path_factory.mktemp("made") / "m.gguf"
        values = write(path, request.param)
        with GGUFFile.open(path) as file:
            yield request.param, file, values

    return written


class SameBits:
    """Tests of a module whose fixture is ``made``."""

    tokens: Sequence[int]

    @pytest.mark.parametrize("name", ["cpu", "wgpu"])
    def test_bits(self, made: Made, name: str) -> None:
        check_bits(made[1], self.tokens, [name])

    def test_parts(self, made: Made) -> None:
        check_parts(made[1], 2)


def common_keys(g: Geometry) -> dict[str, object]:
    """The keys that every architecture has, without its name."""
    keys: dict[str, object] = {
        "block_count": g.layers,
        "context_length": g.context,
        "embedding_length": g.hidden,
        "feed_forward_length": g.ffn,
        "attention.head_count": g.heads,
        "attention.head_count_kv": g.kv_heads,
        "attention.key_length": g.head_dim,
        "attention.value_length": g.head_dim,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": g.head_dim,
    }
    if g.experts:
        keys |= {"expert_count": g.experts, "expert_used_count": g.experts_used}
    return keys


def attention(
    f: RandomFile, at: str, g: Geometry, spread: float = 1.0, without: Sequence[str] = ()
) -> None:
    """q, k, v and output."""
    for role, heads in (("q", g.heads), ("k", g.kv_heads), ("v", g.kv_heads)):
        if role not in without:
            f.matrix(f"{at}attn_{role}.weight", heads * g.head_dim, g.hidden, spread=spread)
    f.matrix(at + "attn_output.weight", g.hidden, g.heads * g.head_dim)


def feed_forward(f: RandomFile, at: str, tail: str, hidden: int, width: int, *stack: int) -> None:
    """gate, up and down; of experts a stack of each."""
    f.matrix(f"{at}ffn_gate{tail}.weight", *stack, width, hidden)
    f.matrix(f"{at}ffn_up{tail}.weight", *stack, width, hidden)
    f.matrix(f"{at}ffn_down{tail}.weight", *stack, hidden, width)


def mixture(f: RandomFile, at: str, g: Geometry) -> None:
    """Router and experts."""
    f.matrix(at + "ffn_gate_inp.weight", g.experts, g.hidden, fmt="F32", spread=2)
    feed_forward(f, at, "_exps", g.hidden, g.ffn, g.experts)


def beginning(f: RandomFile, g: Geometry) -> Iterable[str]:
    """The embedding; then the beginning of each layer's names; then the end of the file's."""
    f.matrix("token_embd.weight", g.vocab, g.hidden)
    for i in range(g.layers):
        yield f"blk.{i}."
    f.vector("output_norm.weight", g.hidden)
    if not g.tied:
        f.matrix("output.weight", g.vocab, g.hidden)


NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
"""Roles by transformers' names of most architectures."""


def transformers_state(
    w: Mapping[str, F32], g: Geometry, names: Mapping[str, str], *, neighbours: bool = False
) -> dict[str, F32]:
    """Tensors under transformers' names. A name that ends in "!" is the whole of it;
    ``neighbours``: rows of q and k lie in the order of neighbouring pairs."""
    state = {
        "model.embed_tokens.weight": w["token_embd.weight"],
        "model.norm.weight": w["output_norm.weight"],
        "lm_head.weight": w.get("output.weight", w["token_embd.weight"]),
    }
    for name, stored in w.items():
        if not name.startswith("blk."):
            continue
        value, (layer, role, what) = stored, name.split(".", 3)[1:]
        if role in ("attn_q", "attn_k") and neighbours:
            heads = g.heads if role == "attn_q" else g.kv_heads
            value = value.reshape(heads, g.head_dim // 2, 2, -1).swapaxes(1, 2)
            value = value.reshape(heads * g.head_dim, -1)
        both = f"ffn_gate+ffn_up{role.removeprefix('ffn_gate')}"
        if role.startswith("ffn_gate") and both in names:  # one tensor there
            up = w[name.replace("ffn_gate", "ffn_up")]
            role, value = both, np.concatenate([value, up], axis=-2)
        theirs = names.get(f"{role}.{what}") or names.get(role)
        if theirs is None:
            assert role.startswith("ffn_up"), role
            continue
        tail = "" if theirs.endswith("!") else f".{what}"
        state[f"model.layers.{layer}.{theirs.rstrip('!')}{tail}"] = value
    return state


def loaded(family: str, settings: Mapping[str, Any], state: Mapping[str, F32]) -> Any:
    """A model of transformers with these weights, in float64."""
    torch, transformers = needs("torch", "torch"), needs("transformers", "transformers")
    config = getattr(transformers, family.removesuffix("ForCausalLM") + "Config")(
        **settings, attn_implementation="eager", experts_implementation="eager"
    )
    model = getattr(transformers, family.removesuffix("Text") + "ForCausalLM")(config)
    model.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in state.items()})
    return model.double().eval()


def settings(g: Geometry) -> dict[str, Any]:
    """What every architecture's configuration of transformers has."""
    found = {
        "vocab_size": g.vocab,
        "hidden_size": g.hidden,
        "intermediate_size": g.ffn,
        "num_hidden_layers": g.layers,
        "num_attention_heads": g.heads,
        "num_key_value_heads": g.kv_heads,
        "head_dim": g.head_dim,
        "rms_norm_eps": float(np.float32(1e-5)),
        "max_position_embeddings": g.context,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": g.tied,
    }
    if g.experts:
        found |= {"num_experts_per_tok": g.experts_used}
    return found


def logits_of(model: Any, tokens: Sequence[int]) -> F32:
    """A sequence's logits by transformers."""
    import torch  # noqa: PLC0415

    with torch.no_grad():
        found: F32 = model(torch.tensor([list(tokens)]), use_cache=False).logits[0].numpy()
    return found


def check_bits(file: GGUFFile, tokens: Sequence[int], backends: Sequence[str]) -> None:
    """Every cut, and threads, give the reference's bits. What a plane changes is products alone,
    whose own tests have both on every backend."""
    weights = Weights.from_file(file)
    for planes in (1, 2) if backends == ["cpu"] else (2,):
        engine = EngineConfig(activation_bits=8 * planes, context=256, max_sequences=1, threads=2)
        expected = run_cut(opened("reference", weights, engine), tokens, [0])
        assert np.isfinite(expected).all()
        for name in backends:
            backend = opened(name, weights, engine)
            for cuts in CUTS:
                assert same_bits(run_cut(backend, tokens, cuts), expected), (name, planes, cuts)
            backend.close()


class RoutedOracle(Oracle):
    """The oracle with a backend's router logits, so with its experts."""

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights)
        self.logits: dict[int | None, F32] = {}
        """What a pass gave, [T, E] by the layer."""

    def tap(self, _stage: str, layer: int | None, value: NDArray[np.generic]) -> None:
        self.logits[layer] = np.array(value, np.float32)

    def _compute(self, run: Run, stage: str, layer: int | None, inputs: Sequence[Array]) -> Array:
        own = super()._compute(run, stage, layer, inputs)
        if stage != "moe_router_logits":
            return own
        assert np.abs(own - self.logits[layer]).max() < 2e-2 * np.abs(own).max()
        return self.logits[layer].astype(np.float64)


def check_accuracy(
    file: GGUFFile, tokens: Sequence[int], true: F32, within: float | None = None
) -> None:
    """The oracle is transformers' model, and the CPU near it. Near are experts too that are as good
    as the oracle's, however much depends on which of them a row takes. ``within``: of the largest
    logit, the oracle's distance in every row; None lets one take another expert."""
    weights = Weights.from_file(file)
    exact = np.abs(Oracle(weights).evaluate(tokens).logits - true).max(axis=1) / np.abs(true).max()
    oracle = RoutedOracle(weights)
    backend = opened("cpu", weights, EngineConfig(context=256, max_sequences=1))
    ours = run(backend, tokens, tap=oracle.tap, stages=frozenset({"moe_router_logits"}))
    backend.close()
    near = oracle.evaluate(tokens).logits
    errors = np.linalg.norm(ours - near, axis=1) / np.linalg.norm(near, axis=1)
    print(
        f"oracle, of the largest logit: median {np.median(exact):.1e}, largest {exact.max():.1e}; "
        f"ours: median {np.median(errors):.1e}, largest {errors.max():.1e}"
    )
    assert np.median(exact) < 2e-5  # transformers' angles, and some of its norms, are float32
    if within is None:
        assert (exact > 1e-3).sum() < 2  # a row with a wrong expert is far off
    else:
        assert exact.max() < within
    assert np.linalg.norm(ours - near) < 2e-3 * np.linalg.norm(near)
    assert np.median(errors) < 2e-3
    assert errors.max() < 2e-2


def check_refusals(
    file: GGUFFile,
    wrong: Mapping[str, object],
    missing: Sequence[str],
    optional: Sequence[str] = (),
) -> None:
    """Without a tensor, or a key, or with a wrong value of one, one line names it. ``optional``:
    roles that a file may lack."""
    arch, vocab = file.metadata["general.architecture"], file.tensors["token_embd.weight"].shape[0]
    for name in list(file.tensors):
        if name == "output.weight" or any(role in name for role in optional):
            continue
        tensor = file.tensors.pop(name)  # type: ignore[attr-defined]
        with pytest.raises(ModelRefused, match=name) as refused:
            Weights.from_file(file)
        assert "\n" not in str(refused.value)
        file.tensors[name] = tensor  # type: ignore[index]
    keys = {f"{arch}.{key}": value for key, value in wrong.items()} | {
        f"{arch}.{key}": None for key in missing
    }
    for key, value in keys.items():
        changed = {k: v for k, v in {**file.metadata, key: value}.items() if v is not None}
        with pytest.raises(ModelRefused, match=key) as refused:
            read_config(changed, vocab=vocab, source="m.gguf")
        assert "\n" not in str(refused.value)


def check_parts(file: GGUFFile, parts: int) -> None:
    """Several parts of a model together give its bits."""
    w, seed, vocab = Weights.from_file(file), 5, file.tensors["token_embd.weight"].shape[0]
    settings = EngineConfig(context=64, max_sequences=2)
    (whole,) = passes([ReferenceBackend(w, settings)], vocab, np.random.default_rng(seed))
    meeting, backends = Meeting(parts), []
    for rank in range(parts):
        mine = Weights(w.config, split(w.graph, rank, parts).graph)
        backends.append(ReferenceBackend(mine, settings, exchange=meeting.exchange(rank)))
    for logits in passes(backends, vocab, np.random.default_rng(seed)):
        assert same_bits(logits, whole)
