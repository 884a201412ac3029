"""Up to 16 threads on one model: answers are those of one thread; streams closed from elsewhere."""

import functools
import os
import random
import threading
from collections.abc import Callable

import isobit
from isobit.config import EngineConfig
from tests.fuzz.targets.models import bases, folder

GROWTH_LIMIT = 2 << 30  # the first input loads the models


@functools.cache
def model(base: int, threads: int) -> isobit.Model:
    path = folder() / f"threads-{os.getpid()}-{base}.gguf"
    if not path.exists():
        path.write_bytes(bases()[base].bytes())
    return isobit.Model(path, "cpu", EngineConfig(threads=threads, max_sequences=3))


def settings(rng: random.Random) -> dict[str, object]:
    return {
        "max_tokens": rng.choice([1, 2, 5, 9]),
        "temperature": rng.choice([0.0, 1.0]),
        "top_k": rng.choice([0, 3]),
        "seed": rng.randrange(9),
    }


def one(rng: random.Random) -> str:
    base = 2 if rng.random() < 0.05 else rng.choice([0, 1])  # that one takes ten times as long
    chosen = model(base, rng.choice([1, 2]))
    errors: list[BaseException] = []
    jobs: list[Callable[[], None]] = []

    def answer(ids: list[int], how: dict[str, object], expected: list[int]) -> None:
        got = list(chosen.generate(ids, **how).token_ids)  # type: ignore[arg-type]
        assert got == expected, f"{ids[:4]} {how}: {got}, alone {expected}"

    def read(stream: isobit.Stream) -> None:
        for _ in stream:
            pass

    for _ in range(rng.choice([2, 4, 16])):
        ids = [rng.randrange(chosen.config.vocab) for _ in range(rng.choice([1, 3, 30]))]
        how = settings(rng)
        if rng.random() < 0.7:
            alone = list(chosen.generate(ids, **how).token_ids)  # type: ignore[arg-type]
            jobs.append(functools.partial(answer, ids, how, alone))
        else:
            stream = chosen.stream(ids, **how)  # type: ignore[arg-type]
            jobs += [functools.partial(read, stream), stream.close]

    def run(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error
    return f"{len(jobs)} threads"
