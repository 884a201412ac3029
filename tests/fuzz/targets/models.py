"""Changed models and odd geometries: inspected, loaded, run."""

import functools
import os
import random
import tempfile
from pathlib import Path

import numpy as np

import isobit
from isobit.config import EngineConfig
from isobit.errors import IsobitError
from isobit.inspect import inspect
from tests.fuzz import gguf_file
from tests.helpers.synth import Geometry, all_in, write_model

AS_LIMIT = 64 << 30  # the KV cache of a long context is mapped, not touched
FORMATS = ["F32", "F16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]


@functools.cache
def folder() -> Path:
    return Path(
        tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").exists() else None)
    )


@functools.cache
def bases() -> list[gguf_file.File]:
    small = {"layers": 1, "hidden": 32, "heads": 2, "kv_heads": 1, "head_dim": 16, "ffn": 32}
    geometries = [
        Geometry(**small, experts=4, context=128),
        Geometry(**small, experts=0, context=64),
        Geometry(layers=2, hidden=256, heads=4, kv_heads=2, head_dim=64, experts=3, ffn=256),
    ]
    path = folder() / "base.gguf"
    return [
        gguf_file.parse(write_model(path, g, all_in("Q8_0"), seed=i).read_bytes())
        for i, g in enumerate(geometries)
    ]


def changed(rng: random.Random) -> bytes:
    file = rng.choice(bases()).copy()
    gguf_file.change(rng, file)
    contents = file.bytes()
    return gguf_file.damage(rng, contents, len(file.header())) if rng.random() < 0.2 else contents


def odd(rng: random.Random, path: Path) -> None:
    heads = rng.choice([1, 2, 3, 4, 5, 6, 8, 12])
    kv = rng.choice([n for n in range(1, heads + 1) if heads % n == 0])
    experts = rng.choice([0, 1, 2, 3, 17, 64])
    fmt = rng.choice(FORMATS)
    sizes = [32, 64, 96, 256, 288] if fmt.startswith("Q") else [1, 2, 3, 31, 33, 63, 64, 255, 257]
    dims = [32, 64, 96, 128] if fmt.startswith("Q") else [2, 4, 6, 30, 34, 62, 66, 126, 130, 512]
    geometry = Geometry(
        layers=rng.choice([1, 1, 2]),
        hidden=rng.choice(sizes),
        heads=heads,
        kv_heads=kv,
        head_dim=rng.choice(dims),
        experts=experts,
        experts_used=rng.randrange(1, experts + 1) if experts else 2,
        ffn=rng.choice(sizes),
        context=rng.choice([1, 2, 3, 63, 64, 65, 128, 1000, 1 << 20]),
        rope_base=rng.choice([1.0, 1.5, 1e4, 1e12]),
        tied=rng.random() < 0.3,
    )
    write_model(path, geometry, all_in(fmt), seed=rng.randrange(2**32))


def one(rng: random.Random) -> str:
    path = folder() / f"{os.getpid()}.gguf"
    if rng.random() < 0.9:  # to make an odd one takes ten times as long
        path.write_bytes(changed(rng))
    else:
        odd(rng, path)
    said = inspect(path).refused
    engine = EngineConfig(threads=rng.choice([1, 1, 2]), activation_bits=8 * rng.choice([1, 2]))
    try:
        model = isobit.Model(path, "cpu", engine)
    except IsobitError as error:
        assert said or "KV cache" in str(error), f"inspect found nothing, load: {error}"
        return "not loaded"
    with model:
        vocab = model.config.vocab
        ids = [
            rng.randrange(vocab) for _ in range(min(rng.choice([1, 2, 3, 17, 65]), model.context))
        ]
        try:
            assert np.isfinite(model.logits(ids, rows=[-1])).all()
        except IsobitError as error:
            return f"logits refused: {type(error).__name__}"
        prompt = rng.choice(["def f(x):", "a", "<|im_start|>user\nhi", ids])
        done = model.generate(
            prompt,
            max_tokens=2,
            temperature=rng.choice([0, 0, 1.0, 1e-6, 1e6]),
            top_k=rng.choice([0, 1, 5]),
            top_p=rng.choice([1.0, 0.5, 1e-9]),
            repeat_penalty=rng.choice([1.0, 1.1, 1e6, 1e-6]),
            stop=rng.choice([None, "a", ["<|im_end|>", "xyz"]]),
        )
        assert len(done.token_ids) <= 2
        if rng.random() < 0.1:
            model.chat([{"role": "user", "content": "a|<|im_end|>b"}], max_tokens=1)
    return "generated"
