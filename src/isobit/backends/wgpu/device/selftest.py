"""The driver self-test: every scalar primitive of the shaders against the specification.

A driver may round, flush or merge operations as it likes; one that does not return the
specification's bits is found here, before it runs a model. ``python -m
isobit.backends.wgpu.device.selftest`` tests every adapter and prints what it found.
"""

import secrets
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from isobit import numerics
from isobit.backends.base import F32
from isobit.backends.wgpu.device.gpu import Device, Step, adapters, describe
from isobit.errors import IsobitError

U32 = NDArray[np.uint32]
Mask = NDArray[np.bool_]

CASES = 1 << 20
"""Cases for each primitive, edge values included."""


@dataclass(frozen=True)
class Finding:
    """What one primitive did: how many cases differ from the specification, and the first."""

    primitive: str
    cases: int
    differing: int
    example: str = ""


def run(device: Device, seed: int | None = None, cases: int = CASES) -> list[Finding]:
    """Test every primitive on edge values and random ones; the seed is random unless given."""
    rng = np.random.default_rng(secrets.randbits(32) if seed is None else seed)
    a, b, c = _columns(rng, -(-cases // 256) * 256)
    inputs = [device.upload(x) for x in (a, b, c)]
    result = device.empty(4 * len(a))

    def column(entry: str, primitive: int, n: int) -> U32:
        kernel = device.kernel(("scalar", "reduce", device.dot, "device/selftest"), entry)
        device.run([Step(kernel, (*inputs, result), (primitive,), (len(a) // 256,))])
        return device.read(result, np.uint32, n)

    findings = []
    operands = Columns(_f(a), _f(b), _f(c))
    with np.errstate(all="ignore"):
        for i, (name, reference) in enumerate(_SCALARS):
            expected, checked = reference(operands)
            got = column("scalars", i, len(a))
            findings.append(_compare(name, (a, b, c), expected, got, checked))
        rows = a.reshape(-1, 256)
        got = column("groups", 0, len(rows))
        expected = _bits(numerics.tree(_f(rows)))
        findings.append(_compare("tree256", (), expected, got, np.isfinite(_f(expected))))
        got = column("groups", 1, len(rows))
        expected = (rows & 0x7FFFFFFF).max(axis=1)
        findings.append(_compare("max256", (), expected, got, np.ones(len(rows), np.bool_)))
    return findings


def _compare(name: str, inputs: tuple[U32, ...], expected: U32, got: U32, checked: Mask) -> Finding:
    bad = np.flatnonzero((expected != got) & checked)
    example = ""
    if len(bad):
        i = bad[0]
        operands = ", ".join(f"{x[i]:08x}" for x in inputs) or f"group {i}"
        example = f"{operands}: expected {expected[i]:08x}, got {got[i]:08x}"
    return Finding(name, int(checked.sum()), len(bad), example)


# The inputs.

_VALUES = [0, 0x007FFFFF, 0x3EFFFFFE, 0x3F317218, 0x40490FDB, 0x42FE0000, 0x46FEFE00, 0x42B00000]
_VALUES += [0x42AE0000, 0x3B800000, 0x3C010204, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000]
_POWERS = [0x00000002, 0x00000400, 0x00400000, 0x00800000, 0x0C800000, 0x0D800000, 0x0F800000]
_POWERS += [0x1F800000, 0x33800000, 0x34000000, 0x3F000000, 0x3F800000, 0x40000000, 0x43800000]
_POWERS += [0x4AC00000, 0x4B000000, 0x4B800000, 0x4F000000, 0x5F000000, 0x7E800000, 0x7F000000]


def _edges() -> U32:
    powers = np.array(_POWERS, np.uint32)
    positive = np.concatenate([np.array(_VALUES, np.uint32), powers - 1, powers, powers + 1])
    return np.unique(np.concatenate([positive, positive | 0x80000000]))


def _columns(rng: np.random.Generator, cases: int) -> tuple[U32, U32, U32]:
    """Three columns of bit patterns: pairs of edge values first, then four kinds of random ones."""

    def column() -> U32:
        any_bits = rng.integers(0, 1 << 32, cases, dtype=np.uint32)
        tiny = any_bits & np.uint32(0x8FFFFFFF)  # below 2^-95, a sixteenth of them subnormal
        usual = rng.standard_normal(cases, np.float32) * np.exp2(rng.integers(-6, 7, cases))
        halves = rng.integers(-(1 << 17), 1 << 17, cases) / 2  # ties of rounding to an integer
        kinds = [any_bits, tiny, *(x.astype(np.float32).view(np.uint32) for x in (usual, halves))]
        return np.choose(rng.integers(0, 4, cases), kinds)

    a, b, c = column(), column(), column()
    edges = _edges()
    pairs = min(len(edges) ** 2, cases)
    a[:pairs], b[:pairs] = (grid.ravel()[:pairs] for grid in np.meshgrid(edges, edges))
    return a, b, c


# The expected bits, and which cases have any.


class Columns(NamedTuple):
    """The operands."""

    a: F32
    b: F32
    c: F32


Reference = Callable[[Columns], tuple[U32, Mask]]


def _f(a: U32) -> F32:
    return a.view(np.float32)


def _bits(a: NDArray[Any]) -> U32:
    return np.ascontiguousarray(a).view(np.uint32)


def _binary(operation: Callable[[F32, F32], F32]) -> Reference:
    """An operation on any operands; there is one NaN."""

    def reference(x: Columns) -> tuple[U32, Mask]:
        value = operation(x.a, x.b)
        made = np.where(np.isnan(value), np.uint32(0x7FC00000), _bits(value))
        return made, np.ones(len(x.a), np.bool_)

    return reference


def _root(x: Columns) -> tuple[U32, Mask]:
    return _bits(np.sqrt(np.abs(x.a))), ~np.isnan(x.a)


def _from_int(x: Columns) -> tuple[U32, Mask]:
    return _bits(x.a.view(np.int32).astype(np.float32)), np.ones(len(x.a), np.bool_)


def _nearest(x: Columns) -> tuple[U32, Mask]:
    small = np.abs(x.a) < np.float32(1 << 22)
    return _bits(np.rint(np.where(small, x.a, 0)).astype(np.int32)), small


def _half(x: Columns) -> tuple[U32, Mask]:
    value = (_bits(x.a) & 0xFFFF).astype(np.uint16).view(np.float16)
    return _bits(value.astype(np.float32)), ~np.isnan(value)


def _exp(x: Columns) -> tuple[U32, Mask]:
    return _bits(numerics.exp(x.a)), ~np.isnan(x.a)


def _maximum(x: Columns) -> tuple[U32, Mask]:
    both_zero = (x.a == 0) & (x.b == 0)  # +0 is the larger
    larger = np.where(both_zero, _bits(x.a) & _bits(x.b), _bits(np.maximum(x.a, x.b)))
    return larger, np.isfinite(x.a) & np.isfinite(x.b)


def _dot(x: Columns) -> tuple[U32, Mask]:
    a, b = (_bits(v).view(np.int8).astype(np.int32).reshape(-1, 4) for v in (x.a, x.b))
    return _bits((a * b).sum(axis=1, dtype=np.int32)), np.ones(len(x.a), np.bool_)


def _scale(planes: int) -> Reference:
    """Scale of the block (a, b)."""

    def reference(x: Columns) -> tuple[U32, Mask]:
        _, d = numerics.quantise(np.stack([x.a, x.b], axis=1), planes)
        return _bits(d), np.ones(len(d), np.bool_)

    return reference


def _integer(planes: int) -> Reference:
    """Integer for b in the block (a, b)."""

    def reference(x: Columns) -> tuple[U32, Mask]:
        q, _ = numerics.quantise(np.stack([x.a, x.b], axis=1), planes)
        return _bits(q[:, 1]), np.ones(len(q), np.bool_)

    return reference


def _chain(steps: Callable[[Columns], tuple[F32, ...]]) -> Reference:
    """Plain operations one after another: ``steps`` gives every result, the last one last. Checked
    where no number on the way is subnormal or not finite, which is what they are for. Nor may one
    be 2^-126 itself: a product just below it rounds up to it, but is flushed where the device
    looks before it rounds."""

    def reference(x: Columns) -> tuple[U32, Mask]:
        values = steps(x)
        smallest = np.float32(2.0**-126)
        plain = [(v == 0) | (np.abs(v) > smallest) & np.isfinite(v) for v in (*x, *values)]
        return _bits(values[-1]), np.logical_and.reduce(plain)

    return reference


_SCALARS: tuple[tuple[str, Reference], ...] = (
    ("add", _binary(np.add)),
    ("sub", _binary(np.subtract)),
    ("mul", _binary(np.multiply)),
    ("div", _binary(np.divide)),
    ("root", _root),
    ("from_int", _from_int),
    ("nearest_int", _nearest),
    ("from_half", _half),
    ("exp", _exp),
    ("maximum", _maximum),
    ("scale of a block, 1 plane", _scale(1)),
    ("scale of a block, 2 planes", _scale(2)),
    ("quantise, 1 plane", _integer(1)),
    ("quantise, 2 planes", _integer(2)),
    ("a*b + c", _chain(lambda x: (x.a * x.b, x.a * x.b + x.c))),
    ("c - a*b", _chain(lambda x: (x.a * x.b, x.c - x.a * x.b))),
    ("a*b + a*c", _chain(lambda x: (x.a * x.b, x.a * x.c, x.a * x.b + x.a * x.c))),
    ("(a + b) + c", _chain(lambda x: (x.a + x.b, (x.a + x.b) + x.c))),
    ("(a + b) - a", _chain(lambda x: (x.a + x.b, (x.a + x.b) - x.a))),
    ("(a * b) * c", _chain(lambda x: (x.a * x.b, (x.a * x.b) * x.c))),
    ("dot product of bytes", _dot),
)


def main() -> int:
    """Test every adapter of this machine; 0 if all pass, 4 if one fails or there is none."""
    try:
        found = adapters()
    except IsobitError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    seed = secrets.randbits(32)
    failed = not found
    for adapter in found:
        print(f"{describe(adapter)}, seed {seed}")
        for f in run(Device(adapter), seed):
            failed |= f.differing > 0
            verdict = f"{f.differing} differ, the first: {f.example}" if f.differing else "exact"
            print(f"  {f.primitive:28} {f.cases:8} cases  {verdict}")
    if not found:
        print("wgpu: no adapter", file=sys.stderr)
    return 4 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
