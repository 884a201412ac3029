"""Recording a Hugging Face Qwen3 or Qwen3-MoE model: the same stages under the same names.

Needs PyTorch and transformers, which nothing else in the package does. Values are taken where the
model computes them; those it has no place for (the experts one by one, the scores before the
softmax) are computed again with its own weights from its own inputs.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from isobit.config import Metadata, ModelConfig
from isobit.errors import BackendUnavailable, UsageError
from isobit.gguf.reader import GGUFFile
from isobit.model.architectures import HUGGING_FACE
from isobit.model.graph import Key
from isobit.model.huggingface import Source
from isobit.model.weights import Weights
from isobit.numerics import RopeTable
from isobit.numerics.ops import Rope
from isobit.verify.arithmetic import Array
from isobit.verify.trace import Emit, Manifest, pieces

try:
    import torch
    import transformers
    from torch.nn import functional
    from transformers.masking_utils import AttentionMaskInterface, eager_mask
    from transformers.modeling_utils import AttentionInterface
    from transformers.models.qwen3_moe.modeling_qwen3_moe import eager_attention_forward, repeat_kv
except ImportError as error:
    raise BackendUnavailable(
        f"hf: expected PyTorch and transformers 5 or later, got: {error}; "
        "pip install '.[test-torch]'"
    ) from None

_ATTENTION = "isobit_recorded"


def build(weights: Weights) -> Any:
    """The file's model in transformers: its dequantised weights in float32, on the CPU. Raises
    BackendUnavailable for one that is not Qwen3 as transformers has it."""
    c = weights.config
    tables = {op.operation.table for op in weights.graph.ops if isinstance(op.operation, Rope)}
    if c.architecture not in ("qwen3", "qwen3moe", "qwen3vl", "qwen3vlmoe"):
        raise BackendUnavailable(f"hf: expected qwen3 or qwen3moe, got {c.architecture}")
    if tables != {RopeTable(c.head_dim, c.rope_base)}:
        raise BackendUnavailable("hf: expected RoPE as it is, got a file that scales it")
    if "blk.0.ffn_gate_up_exps.weight" in weights.graph.weights:
        raise BackendUnavailable("hf: expected gate and up apart, got them in one tensor")
    tied = "output.weight" not in weights.graph.weights
    settings: dict[str, Any] = {
        "vocab_size": c.vocab,
        "hidden_size": c.hidden,
        "intermediate_size": c.ffn,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_dim,
        "rms_norm_eps": c.eps,
        "max_position_embeddings": c.context_length,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_base},
        "tie_word_embeddings": tied,
    }
    if c.is_moe:
        settings |= {
            "num_experts": c.n_experts,
            "num_experts_per_tok": c.n_experts_used,
            "moe_intermediate_size": c.ffn,
            "norm_topk_prob": c.normalise_experts,
        }
    kind = next(
        k for k in HUGGING_FACE.values() if k.architecture == c.architecture.replace("vl", "")
    )
    cls = getattr(transformers, kind.model)
    config = cls.config_class(**settings)
    with torch.device("meta"):
        model = cls(config)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config)  # its tables are computed, not loaded
    state = laid_out(weights, kind.sources(Metadata(settings, "")), model)
    if tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    return model.eval()


def laid_out(
    weights: Weights, sources: Mapping[str, Sequence[Source]], model: Any
) -> dict[str, Any]:
    """The tensors that a model wants, in transformers' layout, from those of the graph."""
    state = {name: torch.full(t.shape, torch.nan) for name, t in model.state_dict().items()}
    for name, weight in weights.graph.weights.items():
        source = next(s for s in sources[name] if s.name in state)
        goal = state[source.name].numpy()
        at = source.moved(np.arange(goal.size).reshape(goal.shape))
        values = weight.float32()
        goal.reshape(-1)[at] = values if source.change is None else source.change.back(values)
    return state


class Transformers:
    """A Qwen3ForCausalLM or Qwen3MoeForCausalLM as something that can be recorded."""

    def __init__(self, model: Any, weights: Weights, name: str = "") -> None:
        self.model = model
        self.config = config = weights.config
        self.graph = weights.graph
        self._about = Manifest(
            tokens=[],
            positions=[],
            backend="transformers",
            device=f"transformers {transformers.__version__}, {model.dtype}, {model.device}",
            model=name,
            architecture=config.architecture,
        )

    @classmethod
    def of(cls, file: GGUFFile) -> "Transformers":
        """A GGUF file's model; see :func:`build`."""
        weights = Weights.from_file(file)
        made = cls(build(weights), weights, file.path.name)
        made._about = dataclasses.replace(made._about, model_sha256=file.sha256())
        return made

    def manifest(self, tokens: Sequence[int]) -> Manifest:
        """What a recording says of itself."""
        ids = [int(t) for t in tokens]
        return dataclasses.replace(self._about, tokens=ids, positions=list(range(len(ids))))

    def run(
        self,
        tokens: Sequence[int],
        chunk: int,
        stages: frozenset[str],
        emit: Emit,
        *,
        step: bool = False,
    ) -> None:
        """Run all tokens in one pass, then emit it in chunks."""
        values = _record(self.model, self.config, list(tokens), stages)
        for start, stop in pieces(len(tokens), chunk, step=step):
            positions = np.arange(start, stop, dtype=np.int32)
            for key in self.graph.stages:
                if key[0] not in stages:
                    continue
                if key not in values:
                    raise UsageError(f"hf: {key[0]}: this model has no such place")
                value = values[key][start:stop]
                if key[0] in ("attn_scores", "attn_softmax"):
                    value = value[..., :stop]
                emit(*key, positions, np.ascontiguousarray(value))


def _record(
    model: Any, config: ModelConfig, tokens: list[int], stages: frozenset[str]
) -> dict[Key, Array]:
    values: dict[Key, Array] = {}

    def keep(stage: str, layer: int | None, value: Any) -> None:
        if stage in stages:
            whole = stage == "moe_router_indices"
            array = (value.int() if whole else value.float()).cpu().numpy()
            values[stage, layer] = array.reshape(len(tokens), *array.shape[1:])

    def heads_first(x: Any) -> Any:  # [1, H, T, N] to [T, H, N]
        return x[0].transpose(0, 1)

    def attention(
        module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **more: Any
    ) -> Any:
        out, weights = eager_attention_forward(module, q, k, v, mask, scaling, **more)
        i = module.layer_idx
        keep("q_post_rope", i, heads_first(q))
        keep("k_post_rope", i, heads_first(k))
        if "attn_scores" in stages:
            scores = torch.matmul(q, repeat_kv(k, module.num_key_value_groups).mT) * scaling
            keep("attn_scores", i, heads_first(torch.tril(scores)))
        keep("attn_softmax", i, heads_first(weights))
        return out, weights

    AttentionInterface.register(_ATTENTION, attention)
    AttentionMaskInterface.register(_ATTENTION, eager_mask)
    before = model.config._attn_implementation
    with ExitStack() as stack:
        stack.callback(model.set_attn_implementation, before)
        model.set_attn_implementation(_ATTENTION)
        for handle in _hooks(model, config, keep):
            stack.callback(handle.remove)
        with torch.inference_mode():
            model(torch.tensor([tokens], device=model.device), use_cache=False)
    return values


Keep = Callable[[str, int | None, Any], None]


def _hooks(model: Any, config: ModelConfig, keep: Keep) -> list[Any]:
    """Hooks that keep every stage but attention's inside; their handles."""
    handles = []

    def out(module: Any, stage: str, layer: int | None = None) -> None:
        handles.append(module.register_forward_hook(lambda _m, _i, y: keep(stage, layer, _rows(y))))

    def into(module: Any, stage: str, layer: int) -> None:
        handles.append(
            module.register_forward_pre_hook(lambda _m, x: keep(stage, layer, _rows(x[0])))
        )

    out(model.model.embed_tokens, "embedding")
    for i, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        out(layer.input_layernorm, "attn_norm", i)
        handles.append(attention.v_proj.register_forward_hook(_qkv(attention, i, keep)))
        into(attention.o_proj, "attention", i)
        out(attention.o_proj, "attn_out", i)
        into(layer.post_attention_layernorm, "post_attn_residual", i)
        out(layer.post_attention_layernorm, "ffn_norm", i)
        if config.is_moe:
            handles.append(layer.mlp.gate.register_forward_hook(_router(i, keep)))
            handles.append(layer.mlp.experts.register_forward_hook(_experts(i, keep)))
            out(layer.mlp, "moe_ffn_out", i)
        else:
            out(layer.mlp.gate_proj, "ffn_gate", i)
            out(layer.mlp.up_proj, "ffn_up", i)
            into(layer.mlp.down_proj, "ffn_swiglu", i)
            out(layer.mlp.down_proj, "ffn_out", i)
        out(layer, "post_ffn_residual", i)
    out(model.model.norm, "final_norm")
    out(model.lm_head, "lm_head")
    return handles


def _rows(x: Any) -> Any:
    """[1, T, n] as [T, n]."""
    x = x[0] if isinstance(x, tuple) else x
    return x.reshape(-1, x.shape[-1])


def _qkv(attention: Any, layer: int, keep: Keep) -> Callable[..., None]:
    def hook(_module: Any, inputs: Any, v: Any) -> None:
        q, k = attention.q_proj.weight, attention.k_proj.weight
        x = inputs[0]
        parts = [functional.linear(x, q), functional.linear(x, k), v]
        keep("qkv_matmul", layer, _rows(torch.cat(parts, dim=-1)))

    return hook


def _router(layer: int, keep: Keep) -> Callable[..., None]:
    def hook(_module: Any, _inputs: Any, outputs: Any) -> None:
        logits, weights, ids = outputs
        keep("moe_router_logits", layer, logits)
        keep("moe_router", layer, weights)
        keep("moe_router_indices", layer, ids)

    return hook


def _experts(layer: int, keep: Keep) -> Callable[..., None]:
    """Each token's experts one by one, as the module's own forward computes them."""

    def hook(module: Any, inputs: Any, _output: Any) -> None:
        x, ids = inputs[0], inputs[1]
        k, n = ids.shape[1], module.intermediate_dim
        both = x.new_empty(len(x), k, 2 * n)
        a, y = x.new_empty(len(x), k, n), x.new_empty(len(x), k, x.shape[1])
        for e in torch.unique(ids).tolist():
            at = torch.where(ids == e)
            both[at] = functional.linear(x[at[0]], module.gate_up_proj[e])
            a[at] = module.act_fn(both[at][:, :n]) * both[at][:, n:]
            y[at] = functional.linear(a[at], module.down_proj[e])
        keep("moe_expert_gate", layer, both[..., :n])
        keep("moe_expert_up", layer, both[..., n:])
        keep("moe_expert_swiglu", layer, a)
        keep("moe_expert_out", layer, y)

    return hook
