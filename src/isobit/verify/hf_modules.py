"""Where the stages of a graph pass in transformers' model of it, as data.

Most follow from the tensors: a product or a norm is what the module gives that has its weight; what
a product or a norm reads is what that module is given. The others an architecture names, and the
inside of attention and of stacked experts is recorded by ``verify.hf``.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from isobit.config import Metadata
from isobit.model.graph import Graph, Key, Op, Value
from isobit.model.huggingface import HuggingFace, ModuleValue, Move, Pick, Reorder, Share, Source

Places = Mapping[Key, tuple[ModuleValue, ...]]
ATTENTION = frozenset({"q_post_rope", "k_post_rope", "attn_scores", "attn_softmax", "attention"})
ACTS = frozenset({"moe_expert_swiglu", "moe_expert_geglu"})
_EXPERTS = frozenset({f"moe_expert_{x}" for x in ("gate_up", "gate", "up", "out")} | ACTS)
_MODULES = frozenset({"matmul", "rms_norm", "embedding"})
_VIEWS = frozenset({"columns", "heads"})


def places(graph: Graph, kind: HuggingFace, config: Metadata, modules: Collection[str]) -> Places:
    """Of each stage that a module gives or is given: where, names whole; of several, side by side.
    Of logits not: they are what the model as a whole gives.

    ``modules``: the names of all that the model has.
    """
    sources, named = kind.sources(config), kind.places(config)
    maker = {v: op for op in graph.ops for v in op.outputs}
    readers: dict[Value, list[Op]] = {}
    for op in graph.ops:
        for v in op.inputs[:1]:
            readers.setdefault(v, []).append(op)

    def of(op: Op, *, given: bool) -> tuple[ModuleValue, ...]:
        found = []
        for w in op.weights if op.kind in _MODULES else ():
            source = next((s for s in sources.get(w.name, ()) if _module(s) in modules), None)
            if source is None or not (given or _whole(source)):
                return ()
            found.append(
                ModuleValue(_module(source), given, moves=_moves(source.moves, int(given)))
            )
        return tuple(found[:1] if given else found)

    def made(value: Value) -> tuple[ModuleValue, ...]:
        op = maker[value]
        while op.kind == "bias" and op.inputs[0].name is None:  # in the same module
            op = maker[op.inputs[0]]
        return of(op, given=False)

    def read(value: Value) -> Iterable[tuple[ModuleValue, ...]]:
        for op in readers.get(value, ()):
            (y, *_) = op.outputs
            if op.kind in _VIEWS and y.name is None and y.shape.width == value.shape.width:
                yield from read(y)
            else:
                yield of(op, given=True)

    found: dict[Key, tuple[ModuleValue, ...]] = {}
    for key, stage in graph.stages.items():
        name, layer = key
        if (name in named and named[name] is None) or stage.value is graph.logits:
            continue
        if (place := named.get(name)) is not None:
            whole = replace(place, module=f"model.layers.{layer}.{place.module}")
            at: tuple[ModuleValue, ...] = (whole,) if whole.module in modules else ()
        else:
            at = made(stage.value) or next(filter(None, read(stage.value)), ())
        if at:
            found[key] = at
    return found


def inside(graph: Graph, kind: HuggingFace, modules: Collection[str]) -> frozenset[Key]:
    """The stages inside of attention, and of experts stacked as most are."""

    def there(name: str, layer: int | None) -> bool:
        if name in ATTENTION:
            return True
        scaled = graph.stages[name, layer].ops[-1].kind == "expert_scale"
        stacked = kind.experts and f"model.layers.{layer}.{kind.experts}" in modules
        return name in _EXPERTS and bool(stacked) and not scaled

    return frozenset(key for key in graph.stages if there(*key))


def head_moves(kind: HuggingFace, config: Metadata, role: str) -> tuple[Reorder, ...]:
    """How values of all heads of a role ("attn_q") come into the graph's order, in any layer."""
    (source, *_) = kind.sources(config).get(f"blk.0.{role}.weight", (Source(""),))
    return _moves(source.moves, 0)


def _module(source: Source) -> str:
    return source.name.removesuffix(".weight")


def _whole(source: Source) -> bool:
    """Whether a module gives no more than what its tensor there becomes here."""
    return not any(isinstance(m, Pick | Share) for m in source.moves)


def _moves(moves: Sequence[Move], axis: int) -> tuple[Reorder, ...]:
    """Those of a matrix's rows (0), or columns (1): of what it gives, or is given."""
    return tuple(replace(m, axis=-1) for m in moves if isinstance(m, Reorder) and m.axis == axis)
