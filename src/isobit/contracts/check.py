"""Running a contract's measures on one backend after another."""

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path

import numpy as np

from isobit import numerics
from isobit.backend_names import BACKENDS
from isobit.contracts import evidence
from isobit.contracts.citations import repository
from isobit.contracts.evidence import Evidence, Result
from isobit.contracts.kinds import FIGURES, SPEED, Accuracy, Figure, Measure, never_fails
from isobit.contracts.measure import engine_for, take
from isobit.contracts.schema import Contract, FalsificationTest
from isobit.contracts.target import Measured, Target, text_file
from isobit.errors import BackendUnavailable, IsobitError, NotRun, UsageError
from isobit.runtime.model import Model

Progress = Callable[[Result], None]
"""Called with each result as it comes."""
_MISSING = (NotRun, BackendUnavailable, UsageError)
"""What keeps a measure from being taken here; anything else it raises is the backend's failure."""


_PLACES = 3
"""Places that a reason names; it says how many more there are."""


def select(
    contract: Contract, only: Sequence[str] = (), without: Sequence[str] = ()
) -> list[FalsificationTest]:
    """The tests with a measure; of them ``only`` those named, and none that is named in
    ``without``. Raises UsageError for a name that is not there, and if none is left; NotRun for a
    contract that measures nothing."""
    tests = [t for t in contract.falsification_tests if t.measure is not None]
    if not tests:
        raise NotRun("tests: expected one with a measure, found none; nothing can be run")
    for name, ids in (("tests", only), ("without", without)):
        if unknown := {*ids} - {t.id for t in tests}:
            raise UsageError(f"{name}: expected tests with a measure, got {min(unknown)!r}")
    chosen = [t for t in tests if (not only or t.id in only) and t.id not in without]
    if not chosen:
        raise UsageError("without: expected a test with a measure to be left, found none")
    return chosen


def check(
    contract: Contract,
    path: Path,
    model: str | Path,
    backend: str,
    *,
    tests: Sequence[FalsificationTest] | None = None,
    threads: int | None = None,
    peer: str | None = None,
    commit: str | None = None,
    seed: int | None = None,
    progress: Progress = lambda _: None,
) -> Evidence:
    """Take the measures that a contract has for a backend, speed last.

    ``tests`` are those that :func:`select` chose, all if left out; ``peer`` is the path of
    llama-bench, ``commit`` what stands in the evidence if there is no repository to ask. A model
    that cannot be opened, a device that is not there and the like leave measures "not run".
    """
    chosen = [
        t
        for t in (select(contract) if tests is None else tests)
        if t.measure is not None and backend in t.measure.backends
    ]
    if not chosen:
        raise UsageError(f"{backend}: expected a test with a measure of it, found none")
    chosen.sort(key=lambda t: t.measure is not None and t.measure.kind in SPEED)
    seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
    about: dict[str, object] = {"name": Path(model).name if str(model) != "sample" else "sample"}
    device = driver = None
    results: list[Result] = []
    bits = sorted({t.measure.bits for t in chosen if t.measure is not None}, reverse=True)
    for n in bits:  # one after the other: memory and speed are those of one model
        group = [t for t in chosen if t.measure is not None and t.measure.bits == n]
        engine = engine_for([t.measure for t in group if t.measure is not None], threads, n)
        try:
            with Model(model, backend, engine) as opened:
                device, driver = opened.backend.device, opened.backend.driver
                about |= {
                    "name": opened.path.name,
                    "sha256": opened.file.sha256(),
                    "architecture": opened.config.architecture,
                    "layers": opened.config.n_layers,
                    "vocabulary": opened.config.vocab,
                }
                with Target(opened, backend, root_of(path), seed, peer) as target:
                    results += _run(group, target, progress)
        except (IsobitError, OSError) as error:
            for result in (missed := [_not_run(t, str(error)) for t in group]):
                progress(result)
            results += missed
    order = {t.id: i for i, t in enumerate(contract.falsification_tests)}
    return Evidence(
        contract=path.stem,
        contract_version=contract.metadata.version,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        backend=backend,
        device=device,
        driver=driver,
        machine=evidence.machine(),
        model=about,
        seed=seed,
        commit=evidence.commit() or commit,
        code=depends_on(contract, backend, path),
        numerics=numerics.VERSION,
        activation_bits=bits[0],
        results=sorted(results, key=lambda r: order[r.test]),
    )


def code_of(contract: Contract, backend: str) -> frozenset[str]:
    """The backends whose code a backend's evidence depends on: itself, and what it is held to."""
    needed = {backend}
    for test in contract.falsification_tests:
        measure = test.measure
        if measure is not None and backend in measure.backends:
            against = getattr(measure, "against", "reference")
            needed.add(against if against in BACKENDS else "reference")
    return frozenset(needed)


def depends_on(contract: Contract, backend: str, path: Path) -> str:
    """Digest of what a backend's evidence depends on: its code, and the texts that are measured,
    which the contract at ``path`` names."""
    code = evidence.code_digest(code_of(contract, backend))
    measures = [t.measure for t in contract.falsification_tests if isinstance(t.measure, Accuracy)]
    names = sorted({m.text for m in measures if m.text is not None and backend in m.backends})
    if not names:
        return code
    digest = hashlib.sha256(code.encode())
    for name in names:
        with suppress(NotRun):  # one that is not there was not measured
            digest.update(hashlib.sha256(text_file(root_of(path), name)).digest())
    return digest.hexdigest()


def root_of(path: Path) -> Path:
    """The folder that a contract's texts are looked for in."""
    return repository(path) or Path.cwd()


def _run(tests: Sequence[FalsificationTest], target: Target, progress: Progress) -> list[Result]:
    results: list[Result] = []
    for test in tests:
        assert test.measure is not None
        if test.measure.kind in SPEED and (why := _not_yet_right(results)):
            results.append(_not_run(test, why))
        else:
            results.append(_one(test, target))
        progress(results[-1])
    return results


def _not_yet_right(results: Sequence[Result]) -> str:
    """Why speed does not count in this run; empty if it does."""
    failing = [r.test for r in results if r.outcome == "failing" and r.kind not in SPEED]
    if failing:
        return f"speed counts only where results are right, and {failing[0]} is failing"
    if not any(r.outcome == "passed" and r.kind == "parity" for r in results):
        return "speed counts only after parity has passed in the same run"
    return ""


def _one(test: FalsificationTest, target: Target) -> Result:
    assert test.measure is not None
    start = time.perf_counter()
    try:
        taken = take(test.measure, target)
        _require_possible(test.measure, taken)
    except _MISSING as error:
        return _not_run(test, str(error))
    except IsobitError as error:
        return _result(test, "failing", f"could not be measured: {error}")
    broken = [
        ": ".join((f"{name} is {taken.figures[name]:.6g}, expected {bound}", *_where(taken, name)))
        for name, bound in test.measure.threshold.items()
        if not bound.holds(taken.figures[name])
    ]
    return Result(
        test=test.id,
        kind=test.measure.kind,
        outcome="failing" if broken else "passed",
        reason="; ".join(broken),
        measure=described(test),
        figures={n: float(f) for n, f in taken.figures.items() if isfinite(f)},
        about=taken.about,
        seconds=round(time.perf_counter() - start, 3),
    )


def _require_possible(measure: Measure, taken: Measured) -> None:
    """Raises NotRun where nothing that could be found would have missed a bound."""
    for name, bound in measure.threshold.items():
        figure = FIGURES[measure.kind][name]
        most = taken.most.get(name, figure.high)
        if never_fails(bound, Figure(figure.what, figure.low, most)):
            raise NotRun(
                f"{name}: expected a bound that can be missed, got {bound} where {figure.low:g} to "
                f"{most:g} are possible here"
            )


def _where(taken: Measured, name: str) -> list[str]:
    """Where a figure came from, in one text; nothing if it is not known."""
    places = taken.where.get(name, [])
    more = [f"and {len(places) - _PLACES} more"] if len(places) > _PLACES else []
    return ["; ".join(places[:_PLACES] + more)] if places else []


def described(test: FalsificationTest) -> dict[str, object]:
    """A test's measure as evidence keeps it, for comparison with the contract's of a later day."""
    assert test.measure is not None
    out: dict[str, object] = test.measure.model_dump(mode="json", exclude_none=True)
    return out


def _not_run(test: FalsificationTest, reason: str) -> Result:
    return _result(test, "not run", reason)


def _result(test: FalsificationTest, outcome: evidence.Outcome, reason: str) -> Result:
    assert test.measure is not None
    return Result(test.id, test.measure.kind, outcome, reason, described(test))
