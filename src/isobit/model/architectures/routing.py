"""How a router's logits choose experts: what a file says of it."""

from collections.abc import Collection
from dataclasses import dataclass

from isobit.config import Metadata
from isobit.numerics.ops.top_k import MOST_GROUPS

_SOFTMAX, _SIGMOID = 1, 2
ROUTING_KEYS: Collection[str] = ("expert_group_count", "expert_group_used_count")
"""Keys that :func:`routing` reads and other architectures refuse."""


@dataclass(frozen=True)
class Routing:
    """A choice of experts; by default the softmax of all."""

    sigmoid: bool = False
    groups: int = 1
    groups_used: int = 1
    scale: float = 1.0
    """What the chosen experts' sum is multiplied by."""


def routing(r: Metadata, arch: str, *, experts: int, default: int | None = None) -> Routing:
    """What the keys say. ``default``: the function of a file that does not name it, 1 a softmax, 2
    sigmoids; None: it must. Raises ModelRefused."""
    key = f"{arch}.expert_gating_func"
    function = r.metadata.get(key, default)
    if function not in (_SOFTMAX, _SIGMOID):
        raise r.refusal(key, f"{_SOFTMAX} (softmax) or {_SIGMOID} (sigmoid)", function)
    groups = r.count(f"{arch}.expert_group_count", 0, MOST_GROUPS, default=1) or 1
    used = groups
    if groups > 1:
        used = r.count(f"{arch}.expert_group_used_count", 1, groups)
        if experts % groups or experts == groups:
            expected = f"a divisor of {experts} experts, below it"
            raise r.refusal(f"{arch}.expert_group_count", expected, groups)
    scale = r.number(f"{arch}.expert_weights_scale", 0.0, 1e6, default=1.0)
    return Routing(function == _SIGMOID, groups, used, scale or 1.0)  # 0: the same as no key
