"""Recording transformers' model of a file: the same stages under the same names.

Needs PyTorch and transformers, which nothing else in the package does. What the model is there, an
architecture declares (``model.huggingface``). Values are taken where that model computes them
(``hf_modules``); those inside of one piece there (stacked experts one by one, scores before the
softmax) are computed again with its own weights from its own inputs; others are left out.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from isobit.config import Metadata
from isobit.errors import BackendUnavailable
from isobit.gguf.formats import dequantize
from isobit.gguf.reader import GGUFFile
from isobit.model.architectures import HUGGING_FACE
from isobit.model.graph import Graph, Key
from isobit.model.huggingface import HuggingFace, ModuleValue, Reorder, Source, rope_parameters
from isobit.model.weights import Weights
from isobit.numerics.ops import Rope
from isobit.verify import hf_modules
from isobit.verify.arithmetic import Array
from isobit.verify.trace import Emit, pieces
from isobit.verify.trace_file import Manifest

try:
    import torch
    import transformers
    from torch.nn import functional
    from transformers.initialization import no_init_weights
    from transformers.masking_utils import AttentionMaskInterface, eager_mask
    from transformers.modeling_utils import AttentionInterface
except ImportError as error:
    raise BackendUnavailable(
        f"hf: expected PyTorch and transformers 5 or later, got: {error}; "
        "pip install '.[test-torch]'"
    ) from None

_ATTENTION = "isobit_recorded"
_BY_KEYS = frozenset({"attn_scores", "attn_softmax"})  # columns are positions


@dataclasses.dataclass(frozen=True)
class Built:
    """A file's model in transformers, and what it was made by."""

    model: Any
    kind: HuggingFace
    config: Metadata


def build(weights: Weights) -> Built:
    """The file's model in transformers: its dequantised weights in float32, on the CPU. Raises
    BackendUnavailable for one that transformers has not, or not like this."""
    c, file = weights.config, weights.file
    assert file is not None, "hf: expected a model of a file"
    if any(name.endswith("attn_qkv.bias") for name in file.tensors):
        raise BackendUnavailable("hf: expected biases of q, k and v apart, got them in one tensor")
    arch = c.architecture.replace("vl", "")
    for kind in HUGGING_FACE.values():
        said = kind.settings if kind.architecture == arch else None
        own = said and said(c, file.tensors)
        if own is not None:
            break
    else:
        known = ", ".join(sorted({k.architecture for k in HUGGING_FACE.values() if k.settings}))
        raise BackendUnavailable(f"hf: expected one of {known}, got {c.architecture}")
    graph = weights.graph
    tables = {op.operation.table for op in graph.ops if isinstance(op.operation, Rope)}
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
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "tie_word_embeddings": "output.weight" not in graph.weights,
    }
    if c.is_moe:
        settings |= {
            "num_experts": c.n_experts,
            "num_experts_per_tok": c.n_experts_used,
            "moe_intermediate_size": c.ffn,
            "norm_topk_prob": c.normalise_experts,
        }
    if len(tables) == 1:
        settings["rope_parameters"] = rope_parameters(next(iter(tables)), c.head_dim)
    settings |= own
    cls = getattr(transformers, kind.model)
    with no_init_weights():
        model = cls(cls.config_class(**settings))
    config = Metadata(settings, "config.json")
    model.load_state_dict(laid_out(weights, kind, config, model), assign=True)
    if len(tables) == 1 and (factors := next(iter(tables)).factors) and len(set(factors)) > 1:
        model.model.rotary_emb.inv_freq /= torch.tensor(factors)  # as the file says
    return Built(model.eval(), kind, config)


def laid_out(weights: Weights, kind: HuggingFace, config: Metadata, model: Any) -> dict[str, Any]:
    """The tensors that a model wants, in transformers' layout, from those of the file. Raises
    BackendUnavailable where one of either has no place in the other."""
    file, used = weights.file, weights.graph.weights
    assert file is not None, "hf: expected a model of a file"
    sources, wanted = kind.sources(config), dict(model.named_parameters(remove_duplicate=False))
    state = {name: t.detach().clone() for name, t in model.state_dict().items()}
    left = {name: state[name].numel() for name in wanted}
    for name in {**used, **file.tensors}:
        layer, _, role = name.removeprefix("blk.").partition(".")
        possible: Sequence[Source] = sources.get(name, ())
        if role == "ffn_gate_up_exps.weight":  # as transformers has them
            possible = (Source(f"model.layers.{layer}.{kind.experts}.gate_up_proj"),)
        source = next((s for s in possible if s.name in state), None)
        if source is None:
            if name in used and name in file.tensors:
                raise BackendUnavailable(f"hf: {name}: expected a place in {kind.model}, got none")
            continue  # another name of what the graph has, or nothing that the pass reads
        goal = state[source.name].numpy()
        at = source.moved(np.arange(goal.size).reshape(goal.shape))
        values = _values(weights, name).reshape(at.shape)
        goal.reshape(-1)[at] = values if source.change is None else source.change.back(values)
        left[source.name] = left.get(source.name, at.size) - at.size
    for name in [name for name, n in left.items() if n]:
        if name == "lm_head.weight" and "output.weight" not in used:
            state[name] = state["model.embed_tokens.weight"]
        elif name.endswith(".bias"):
            state[name].zero_()
        else:
            raise BackendUnavailable(f"hf: {name} of {kind.model}: expected in the file, got none")
    return state


def _values(weights: Weights, name: str) -> Array:
    file = weights.file
    if file is None or name not in file.tensors:  # a part of one of the file's
        return weights.graph.weights[name].float32()
    info = file.tensors[name]
    return dequantize(info.format, file.data(name), info.shape)


class Transformers:
    """A model of transformers as something that can be recorded."""

    def __init__(self, built: Built, weights: Weights, name: str = "") -> None:
        self.model = model = built.model
        self.config = config = weights.config
        whole, modules = weights.graph, dict(model.named_modules())
        places = hf_modules.places(whole, built.kind, built.config, modules)
        inside = hf_modules.inside(whole, built.kind, modules)
        self.graph = whole.showing({*places, *inside, *filter(None, [whole.logits.key])})
        """Of the stages that are found there."""
        self._recorder = _ModuleRecorder(built, self.graph, places)
        self._about = Manifest(
            tokens=[],
            positions=[],
            backend="transformers",
            device=f"transformers {transformers.__version__}, {model.dtype}, {model.device}",
            model=name,
            architecture=config.architecture,
            stages=list(self.graph.names),
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
        values = self._recorder.run(list(tokens), stages)
        for start, stop in pieces(len(tokens), chunk, step=step):
            positions = np.arange(start, stop, dtype=np.int32)
            for key in self.graph.stages:
                if key[0] not in stages:
                    continue
                value = values[key][start:stop]
                if key[0] in _BY_KEYS:
                    value = value[..., :stop]
                emit(*key, positions, np.ascontiguousarray(value))


class _ModuleRecorder:
    """Hooks in a model that keep the stages of a pass, in the graph's order and shapes."""

    def __init__(self, built: Built, graph: Graph, places: hf_modules.Places) -> None:
        self._model, self._kind, self._graph = built.model, built.kind, graph
        self._places, self._modules = places, dict(built.model.named_modules())
        source = sys.modules[type(built.model).__module__]
        self._attend, self._repeat = source.eager_attention_forward, source.repeat_kv
        self._heads = {
            f"{x}_post_rope": hf_modules.head_moves(built.kind, built.config, f"attn_{x}")
            for x in "qk"
        }

    def run(self, tokens: list[int], stages: frozenset[str]) -> Mapping[Key, Array]:
        """Every stage of these names, of every layer."""
        self._values: dict[Key, Array] = {}
        self._parts: dict[Key, list[Any]] = {}
        self._stages, self._tokens = stages, len(tokens)
        AttentionInterface.register(_ATTENTION, self._attention)
        AttentionMaskInterface.register(_ATTENTION, eager_mask)
        model = self._model
        with ExitStack() as stack:
            stack.callback(model.set_attn_implementation, model.config._attn_implementation)
            model.set_attn_implementation(_ATTENTION)
            for at, places in self._places.items():
                for place in places if at[0] in stages else ():
                    stack.callback(self._hook(at, place, len(places)).remove)
            for i in range(self._graph.n_layers):
                if experts := self._modules.get(f"model.layers.{i}.{self._kind.experts}"):
                    stack.callback(experts.register_forward_hook(self._experts(i)).remove)
            with torch.inference_mode():
                ids = torch.tensor([tokens], device=model.device)
                logits = model(ids, use_cache=False).logits
        if key := self._graph.logits.key:
            self._keep(*key, logits)
        return self._values

    def _keep(self, stage: str, layer: int | None, value: Any) -> None:
        if stage in self._stages and (stage, layer) in self._graph.stages:
            shape = self._graph.stages[stage, layer].value.shape
            whole = shape.dtype is np.int32
            array = value.to(torch.int32 if whole else torch.float32).cpu().numpy()
            if stage not in _BY_KEYS:
                array = array.reshape(self._tokens, *shape.row)
            self._values[stage, layer] = array

    def _hook(self, key: Key, place: ModuleValue, of: int) -> Any:
        """Keep what a module gives, or is given; of several, what they give side by side."""

        def keep(x: Any) -> None:
            x = x[place.index] if isinstance(x, tuple) else x
            x = _moved(x.reshape(self._tokens, -1), place.moves)
            parts = self._parts.setdefault(key, [])
            parts.append(x)
            if len(parts) == of:
                self._keep(*key, torch.cat(parts, dim=-1))

        module = self._modules[place.module]
        if place.given:
            return module.register_forward_pre_hook(lambda _m, x: keep(x))
        return module.register_forward_hook(lambda _m, _i, y: keep(y))

    def _attention(
        self, module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **more: Any
    ) -> Any:
        out, weights = self._attend(module, q, k, v, mask, scaling=scaling, **more)
        i = module.layer_idx
        for name, x in (("q_post_rope", q), ("k_post_rope", k)):
            self._keep(name, i, _moved(x[0].transpose(0, 1).flatten(1), self._heads[name]))
        if "attn_scores" in self._stages:
            scores = q @ self._repeat(k, module.num_key_value_groups).mT * scaling
            self._keep("attn_scores", i, scores.masked_fill(mask < 0, 0)[0].transpose(0, 1))
        self._keep("attn_softmax", i, weights[0].transpose(0, 1))
        self._keep("attention", i, out)
        return out, weights

    def _experts(self, layer: int) -> Callable[..., None]:
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
            self._keep("moe_expert_gate_up", layer, both)
            self._keep("moe_expert_gate", layer, both[..., :n])
            self._keep("moe_expert_up", layer, both[..., n:])
            for name in hf_modules.ACTS:
                self._keep(name, layer, a)
            self._keep("moe_expert_out", layer, y)

        return hook


def _moved(x: Any, moves: Sequence[Reorder]) -> Any:
    """Columns of [T, n] in the graph's order."""
    for move in moves:
        order = move(np.arange(x.shape[-1])[None])[0]
        x = x[:, torch.from_numpy(order).to(x.device)]
    return x
