"""Device memory that is planned before there is any: regions, and what a plan adds up to."""

from dataclasses import dataclass

from isobit.errors import BackendUnavailable

ALIGNMENT = 256
STAGING_SLOTS = 16
"""Parts of tensors on their way at once, each by a thread,"""
SLOT_BYTES = 8 << 20
"""of at most so many bytes."""
STAGING_BYTES = STAGING_SLOTS * SLOT_BYTES
"""Where they arrive before they are repacked."""
_CONTEXT_BYTES = 500 << 20
"""What the driver and the compiled kernels take, about."""


def aligned(nbytes: int) -> int:
    """Round up to the alignment of every buffer."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def supers(columns: int) -> int:
    """Superblocks of a row."""
    return -(-columns // 256)


@dataclass(eq=False)
class Region:
    """One allocation, whose parts are known before its address."""

    nbytes: int = 0
    address: int = 0

    def take(self, nbytes: int) -> int:
        """Where a part of so many bytes begins, in bytes from the region's start."""
        offset = self.nbytes
        self.nbytes += aligned(nbytes)
        return offset


@dataclass(frozen=True)
class Plan:
    """Bytes of device memory by purpose."""

    weights: int
    cache: int
    states: int
    rope: int
    graphs: int
    """Captured steps, of every number of sequences."""
    workspace: int

    @property
    def total(self) -> int:
        """All of it, with what the driver takes."""
        return _CONTEXT_BYTES + sum(n for _, n in self.parts)

    @property
    def parts(self) -> tuple[tuple[str, int], ...]:
        """Each purpose with its bytes."""
        return (
            ("weights", self.weights),
            ("KV cache", self.cache),
            ("states", self.states),
            ("RoPE tables", self.rope),
            ("graphs", self.graphs),
            ("workspace", self.workspace),
        )

    def __str__(self) -> str:
        """One line for people."""
        parts = (*self.parts, ("driver", _CONTEXT_BYTES))
        terms = " + ".join(f"{name} {n / 1e9:.2f}" for name, n in parts if n or name != "states")
        return f"{terms} = {self.total / 1e9:.2f} GB"

    def left(self, free: int) -> int:
        """What of free memory all but the KV cache leaves."""
        return free - (self.total - _CONTEXT_BYTES - self.cache)  # the driver's part is taken

    def check(self, free: int, total: int) -> None:
        """Raise BackendUnavailable with the arithmetic if it does not fit."""
        needed = self.total - _CONTEXT_BYTES  # the driver has taken its part already
        if needed > free:
            raise BackendUnavailable(
                f"cuda: the model needs {self}; {free / 1e9:.2f} of {total / 1e9:.2f} GB are "
                "free (a smaller --context or fewer sequences make the KV cache smaller)"
            )
