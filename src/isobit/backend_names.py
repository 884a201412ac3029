"""What the backends are called; nothing is imported to know it."""

from typing import Literal, get_args

BackendName = Literal["reference", "cpu", "cuda", "wgpu"]
BACKENDS: tuple[str, ...] = get_args(BackendName)
VARIANTS = ("cuda:unfused",)
"""Backends operation by operation, so that every stage can be traced."""
OWN_GPU = ("cuda", *VARIANTS)
"""Those of which each model, or part of one, has a GPU of its own in a cluster."""
