"""docs/numerics.md once more, number by number in Python floats: slow, and sharing no line with
``isobit.numerics``.

A binary64 operation on binary32 values, rounded to binary32, is the binary32 operation (53 bits
are more than 2*24 + 1), so ``f32(a + b)`` is one rounding. Integers are Python's; ``int32`` asserts
that they would have fit.
"""

from collections.abc import Sequence
from math import factorial, inf, isfinite, isnan, nan, pi, sqrt
from struct import pack, unpack

import numpy as np

from isobit.gguf.formats import Format

Row = Sequence[float]


def f32(x: float) -> float:
    """Round to binary32."""
    return float(np.float32(x))


def bits(pattern: int) -> float:
    """The binary32 value of a bit pattern."""
    return float(unpack("<f", pack("<I", pattern))[0])


def int32(n: int) -> int:
    assert -(2**31) <= n < 2**31, n
    return n


def tree(v: Row) -> float:
    v = list(v)
    while len(v) > 1:
        half = len(v) // 2
        v = [f32(v[i] + v[i + half]) for i in range(half)]
    return v[0]


def sum256(v: Row) -> float:
    lanes = [0.0] * 256
    for j, x in enumerate(v):
        lanes[j % 256] = f32(lanes[j % 256] + x)
    return tree(lanes)


def exp(x: float) -> float:
    if isnan(x):
        return x
    if x < -87:
        return 0.0
    x = min(x, 88.0)
    n = round(f32(x * bits(0x3FB8AA3B)))  # Python rounds ties to even
    r = f32(f32(x - f32(n * bits(0x3F318000))) - f32(n * bits(0xB95E8083)))
    p = bits(0x3AB511E7)
    for c in (0x3C091D10, 0x3D2AAC79, 0x3E2AAA49, 0x3EFFFFFE, 0x3F800000, 0x3F800000):
        p = f32(f32(p * r) + bits(c))
    return f32(p * 2.0**n)


def rms_norm(x: Row, weight: Row, eps: float) -> list[float]:
    mean = f32(sum256([f32(a * a) for a in x]) / len(x))
    r = f32(1 / f32(sqrt(f32(mean + eps))))
    return [f32(f32(a * r) * w) for a, w in zip(x, weight, strict=True)]


def silu_gate(g: float, u: float) -> float:
    return f32(f32(g / f32(1 + exp(-g))) * u)


def rope(x: Row, cos: Row, sin: Row) -> list[float]:
    half = len(x) // 2
    a, b = x[:half], x[half:]
    first = [f32(f32(a[i] * cos[i]) - f32(b[i] * sin[i])) for i in range(half)]
    return first + [f32(f32(b[i] * cos[i]) + f32(a[i] * sin[i])) for i in range(half)]


def cos_sin(angle: float) -> tuple[float, float]:
    """Python's floats are binary64; each operation below is one of section 8's."""
    c1, c2, c3 = (
        float(unpack("<d", pack("<Q", c))[0])
        for c in (0x3FF921FB40000000, 0x3E74442D00000000, 0x3CF8469898CC5170)
    )
    n = round(angle * (2 / pi))
    r = ((angle - n * c1) - n * c2) - n * c3
    square = r * r
    s = c = 0.0
    for k in range(17, 0, -2):
        s = s * square + (-1) ** (k // 2) / factorial(k)
    for k in range(16, -1, -2):
        c = c * square + (-1) ** (k // 2) / factorial(k)
    s = s * r
    c, s = [(c, s), (-s, c), (-c, -s), (s, -c)][n % 4]
    return f32(c), f32(s)


def quantise(x: Row, planes: int) -> tuple[list[int], float]:
    limit, reciprocal = {2: (32639, 0x38008183), 1: (127, 0x3C010204)}[planes]
    if not all(isfinite(a) for a in x):
        return [0] * len(x), nan
    amax = max(abs(a) for a in x)
    if amax < 2.0**-96:
        return [0] * len(x), 0.0
    r = f32(limit / amax)
    return [round(f32(a * r)) for a in x], f32(amax * bits(reciprocal))


def split(q: int, planes: int) -> list[int]:
    if planes == 1:
        return [q]
    lo = (q + 128) % 256 - 128
    return [(q - lo) // 256, lo]


def joined(sums: Sequence[int]) -> float:
    """f(H)*256 + f(L), or f(S) for one plane."""
    total = f32(int32(sums[0]))
    return total if len(sums) == 1 else f32(f32(total * 256) + f32(int32(sums[1])))


def dot(fmt: Format, row: np.ndarray, x: Row, planes: int) -> float:
    """One row of a quantised matrix (uint8 bytes) times x."""
    u = fmt.unpack(row.reshape(-1, fmt.block_bytes))
    size, run = fmt.block_size // fmt.parts, fmt.block_size // fmt.parts // fmt.groups
    y = 0.0
    for s in range(0, len(x), 256):
        q, d = quantise(x[s : s + 256], planes)
        parts = [split(n, planes) for n in q]
        t = None if size == 256 else 0.0
        for at in range(0, len(q), size):
            b = (s + at) // size
            codes, scales = u.codes[b].tolist(), u.scales[b].tolist()
            sums = [
                sum(codes[k] * scales[k // run] * parts[at + k][p] for k in range(size))
                for p in range(planes)
            ]
            ub = f32(float(u.d[b]) * joined(sums))
            if u.mins is not None and u.dmin is not None:
                mins = u.mins[b].tolist()
                m = int32(sum(mins[k // run] * q[at + k] for k in range(size)))
                ub = f32(ub - f32(float(u.dmin[b]) * f32(m)))
            t = ub if t is None else f32(t + ub)
        assert t is not None
        y = f32(y + f32(d * t))
    return y


def attention(
    q: Row, k: Sequence[Row], v: Sequence[Row], first: int = 0, sink: float | None = None
) -> list[float]:
    """One query over keys first ... pos, all of 0 ... pos given before quantisation."""
    width = len(q)
    q_int, dq = quantise(q, 2)
    dq = f32(dq * f32(1 / sqrt(width)))
    m = total = 0.0
    out = [0.0] * width
    for start in range(first // 64 * 64, len(k), 64):
        unseen = max(0, first - start)
        keys = [quantise(x, 2) for x in k[start : start + 64]]
        values = [quantise(x, 2) for x in v[start : start + 64]]
        s = []
        for k_int, dk in keys:
            pairs = [split(n, 2) for n in k_int]
            sums = [sum(a * b[p] for a, b in zip(q_int, pairs, strict=True)) for p in (0, 1)]
            s.append(f32(f32(dq * dk) * joined(sums)))
        mt = max(s[unseen:])
        p = [0.0] * unseen + [exp(f32(a - mt)) for a in s[unseen:]] + [0.0] * (64 - len(s))
        lt = tree(p)
        weighted = [f32(a * dv) for a, (_, dv) in zip(p, values, strict=False)]
        p_int, g = quantise(weighted, 2)
        ot = []
        for c in range(width):
            pairs = [split(v_int[c], 2) for v_int, _ in values]
            sums = [sum(a * b[i] for a, b in zip(p_int, pairs, strict=True)) for i in (0, 1)]
            ot.append(f32(g * joined(sums)))
        if start <= first:
            m, total, out = mt, lt, ot
            continue
        top = max(m, mt)
        a, b = exp(f32(m - top)), exp(f32(mt - top))
        total = f32(f32(total * a) + f32(lt * b))
        out = [f32(f32(o * a) + f32(n * b)) for o, n in zip(out, ot, strict=True)]
        m = top
    if sink is not None:
        top = max(m, sink)
        a = exp(f32(m - top))
        total = f32(f32(total * a) + exp(f32(sink - top)))
        out = [f32(o * a) for o in out]
    share = f32(1 / total)
    return [f32(o * share) for o in out]


def top_k(
    z: Row, k: int, *, normalise: bool, groups: int = 1, used: int = 1
) -> tuple[list[int], list[float]]:
    m = max(z)
    e = [exp(f32(a - m)) for a in z]
    total = sum256(e)
    p = [f32(a / total) for a in e]
    return choose(p, k, normalise=normalise, groups=groups, used=used, added=1)


def choose(
    p: Row,
    k: int,
    *,
    normalise: bool,
    bias: Row | None = None,
    groups: int = 1,
    used: int = 1,
    added: int = 2,
) -> tuple[list[int], list[float]]:
    score = [f32(a + b) for a, b in zip(p, bias or [0.0] * len(p), strict=True)]
    size = len(p) // groups
    best = [sorted(score[g * size : (g + 1) * size])[-added:] for g in range(groups)]
    kept = first_of([f32(sum(few)) for few in best], list(range(groups)), used)
    left = [i for i in range(len(p)) if i // size in kept]
    ids = first_of(score, left, k)
    if not normalise:
        return ids, [p[i] for i in ids]
    chosen = 0.0
    for i in ids:
        chosen = f32(chosen + p[i])
    return ids, [f32(p[i] / max(chosen, 2**-14)) for i in ids]


def first_of(score: Row, left: list[int], n: int) -> list[int]:
    found: list[int] = []
    for _ in range(n):
        best = -1
        for i in left:
            if i not in found and (best < 0 or score[i] > score[best]):
                best = i
        found.append(best)
    return found


def combine(weights: Row, outputs: Sequence[Row]) -> list[float]:
    out = [0.0] * len(outputs[0])
    for w, y in zip(weights, outputs, strict=True):
        out = [f32(a + f32(w * b)) for a, b in zip(out, y, strict=True)]
    return out


def log(x: float) -> float:
    pattern = unpack("<i", pack("<f", x))[0]
    n = (pattern - 0x3F3504F3) >> 23
    f = f32(bits(pattern - (n << 23)) - 1)
    p = bits(0xBD9C5AC4)
    for c in (0x3E02ADB6, 0xBE06C2A1, 0x3E116D0E, 0xBE2A3922, 0x3E4CD004, 0xBE800113, 0x3EAAAAAA):
        p = f32(f32(p * f) + bits(c))
    q = f32(f * f)
    r = f32(f32(f32(f32(q * f) * p) + f32(n * bits(0xB95E8083))) - f32(q * 0.5))
    return f32(f32(r + f) + f32(n * bits(0x3F318000)))


def weight(p: float) -> int:
    return int(p * 2.0**40)


def log_softmax(z: Row) -> list[float]:
    x = [max(f32(v - max(z)), -float(np.finfo(np.float32).max)) for v in z]
    total = sum(weight(exp(v)) for v in x)
    return [f32(v - log(f32(total) * 2.0**-40)) for v in x]


def philox(seed: int, index: int) -> int:
    """Word 0 of Philox 4x64-10: key (seed, 0), counter (index, 0, 0, 0)."""
    mask = (1 << 64) - 1
    c0, c1, c2, c3, k0, k1 = index, 0, 0, 0, seed, 0
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (b >> 64) ^ c1 ^ k0, b & mask, (a >> 64) ^ c3 ^ k1, a & mask
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return c0


def kept(z: Row, temperature: float, top_k: int, top_p: float, min_p: float) -> dict[int, int]:
    """Section 10: the weights of the ids that are kept. A logit of -inf is not allowed."""
    if temperature == 0:
        return {max(range(len(z)), key=lambda i: (z[i], -i)): 1 << 40}
    p = [exp(f32(f32(v - max(z)) / f32(temperature))) if v > -inf else 0.0 for v in z]
    ids = sorted(range(len(z)), key=lambda i: (-p[i], i))
    ids = ids[: top_k or None]
    if top_p < 1:
        enough = int(top_p * 2.0**64) * sum(weight(p[i]) for i in ids) >> 64
        total, n = 0, 0
        while n == 0 or total < enough:
            total, n = total + weight(p[ids[n]]), n + 1
        ids = ids[:n]
    return {i: weight(p[i]) for i in ids if p[i] >= f32(min_p)}


def draw(kept: dict[int, int], random: int) -> int:
    u, total = random * sum(kept.values()) >> 64, 0
    for i in sorted(kept):
        total += kept[i]
        if total > u:
            return i
    raise AssertionError
