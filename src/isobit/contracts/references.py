"""What a contract's parts say of each other, and of other contracts: is it there?"""

import difflib
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from isobit.backend_names import BACKENDS
from isobit.contracts.citations import NEAR, repository
from isobit.contracts.document import Document, Key
from isobit.contracts.findings import Severity
from isobit.contracts.schema import Contract, FalsificationTest, ProofObligation

_IDS = re.compile(  # bounded: a long text of such words is read once, not once from each of them
    r"\b([A-Z][A-Z0-9]{0,63}(?:[_-][A-Z0-9]{1,64}){0,15}[_-])([0-9]{2,4})\b"
    r"((?:(?:/|\.\.)[0-9]{2,4}\b)*)"
)
_MORE = re.compile(r"(/|\.\.)([0-9]+)")
_BRACKETED = re.compile(r"\(([A-Z][A-Z0-9]*(?:[_-][A-Z0-9]+)+)\)")
_PLACE = re.compile(r"falsification_tests\[([0-9]{1,4})\]")
_TARGETS = frozenset(
    ("all", "any", "scalar", "simd", "sse2", "avx2", "avx512", "neon", "ptx") + ("gpu", *BACKENDS)
)
"""What an obligation may apply to besides the contract's own equations and functions."""
MOST_NEAR = 1000
"""Names that one that is not there is held against, for the one that was meant."""
MOST = 99
"""Ids after the first that one range can name."""


def obligation_id(obligation: ProofObligation) -> str | None:
    """The obligation's name: its id, or the one in brackets in its property."""
    if obligation.id is not None:
        return obligation.id
    found = _BRACKETED.findall(obligation.property)
    return found[-1] if found else None


def discharged_by(test: FalsificationTest, known: frozenset[str]) -> set[str]:
    """Ids of the obligations that a test could refute, as the test has it."""
    if test.discharges:
        return set(test.discharges)
    texts = (test.rule, test.prediction, test.test or "", test.if_fails or "")
    return {name for text in texts for name in named(text, known)}


def served(contract: Contract) -> dict[str, set[str]]:
    """Ids of the obligations that each test could refute, by the test's: as the test has it, or
    the obligation, in its ``discharged_by`` or, in brackets, its words."""
    known = frozenset(filter(None, map(obligation_id, contract.proof_obligations)))
    tests = [t.id for t in contract.falsification_tests]
    out = {t.id: discharged_by(t, known) for t in contract.falsification_tests}
    for obligation in contract.proof_obligations:
        name = obligation_id(obligation)
        said = [_test(test, tests) for test in obligation.discharged_by]
        for test in {*said, *_BRACKETED.findall(obligation.property)} & set(out):
            if name is not None:
                out[test].add(name)
    return out


def _test(name: str, tests: Sequence[str]) -> str:
    """The id of a test that is named by its place: ``falsification_tests[2]``."""
    place = _PLACE.fullmatch(name)
    return tests[int(place[1])] if place and int(place[1]) < len(tests) else name


def named(text: str, known: frozenset[str]) -> set[str]:
    """Which ids a text names; "AC_X_002/003" and "AC_X_001..005" name several."""
    found = set()
    numbers = _numbers(known)
    for stem, number, more in set(_IDS.findall(text)):
        found |= {stem + number} & known
        for sign, last in _MORE.findall(more):
            first = int(last if sign == "/" else number)
            there = numbers.get((stem, len(last)), set())
            for i in there.intersection(range(first, min(int(last), first + MOST) + 1)):
                found.add(f"{stem}{i:0{len(last)}d}")
    return found


@lru_cache(maxsize=1)
def _numbers(known: frozenset[str]) -> dict[tuple[str, int], set[int]]:
    """The numbers at the ends of ids, by what is before them and how many digits they have."""
    out: dict[tuple[str, int], set[int]] = {}
    for match in filter(None, map(_IDS.fullmatch, known)):
        out.setdefault((match[1], len(match[2])), set()).add(int(match[2]))
    return out


def check_references(document: Document, contract: Contract) -> None:
    """Add a finding for each obligation without a test, and each name of what is not there."""
    _coverage(document, contract)
    _discharged(document, contract)
    _depends_on(document, contract)
    _harnesses(document, contract)
    _applies_to(document, contract)


def _coverage(document: Document, contract: Contract) -> None:
    names = [obligation_id(o) for o in contract.proof_obligations]
    known = frozenset(n for n in names if n is not None)
    typed = any(t.discharges for t in contract.falsification_tests)
    if not known:
        # without ids nobody can tell, and only what isobit is to run needs them
        if names and (typed or any(t.measure for t in contract.falsification_tests)):
            message = "expected obligations with an id, got none; no test can be told to cover them"
            document.find("obligation-uncovered", message, ("proof_obligations",), "warning")
        return
    serving = served(contract)
    covered: set[str] = set()
    for i, test in enumerate(contract.falsification_tests):
        found = serving[test.id] & known
        covered |= found
        if not found:
            message = f"expected {test.id} to serve an obligation, got none; add discharges: [id]"
            document.find("test-unneeded", message, ("falsification_tests", i, "id"), "warning")
    for i, obligation in enumerate(names):
        if obligation in covered:
            continue
        message = "expected an id; no test can be told to cover this obligation"
        if obligation is not None:
            message = f"expected a test that could refute {obligation}, found none"
        place: Key = ("proof_obligations", i)
        document.find("obligation-uncovered", message, place, "error" if typed else "warning")
    for at, name in _named_obligations(contract):
        if name not in known:
            message = f"expected an obligation's id, got {name!r}, which no obligation has"
            document.find("unknown-id", message, at, "error" if typed else "warning")


def _named_obligations(contract: Contract) -> Iterator[tuple[Key, str]]:
    """Every place that names an obligation."""
    for i, test in enumerate(contract.falsification_tests):
        for j, name in enumerate(test.discharges):
            yield ("falsification_tests", i, "discharges", j), name
    for i, stage in enumerate(contract.implementation_stages):
        for j, name in enumerate(stage.expected_acceptance):
            yield ("implementation_stages", i, "expected_acceptance", j), name


def _discharged(document: Document, contract: Contract) -> None:
    """``discharged_by`` names tests, and harnesses."""
    tests = [t.id for t in contract.falsification_tests]
    known = {*tests, *(k.id for k in contract.kani_harnesses)}
    for i, obligation in enumerate(contract.proof_obligations):
        for name in obligation.discharged_by:
            test = _test(name, tests)
            if test not in known and (_IDS.fullmatch(test) or _PLACE.fullmatch(test)):
                message = f"expected a test's id, got {name!r}, which no test has"
                document.find("unknown-id", message, ("proof_obligations", i, "discharged_by"))


def _depends_on(document: Document, contract: Contract) -> None:
    """Contracts beside this one, above it, or anywhere below the repository's contracts/."""
    path = Path(document.path).absolute()
    root = repository(path)
    if root is None:
        return
    folders = [f for f in path.parents if f.is_relative_to(root)]
    there = {f.stem for folder in folders for f in folder.glob("*.y*ml")}
    there |= {f.stem for f in (root / "contracts").rglob("*.y*ml")}
    for i, name in enumerate(contract.metadata.depends_on):
        at: Key = ("metadata", "depends_on", i)
        stem = re.sub(r"\.ya?ml$", "", name.rsplit("/", 1)[-1])
        if stem == path.stem:
            document.find("dangling-reference", f"expected another contract, got {name} itself", at)
        elif stem not in there:
            message = f"expected a contract of this repository, got {name}, which is not there"
            _dangling(document, message, at, stem, there)


def _harnesses(document: Document, contract: Contract) -> None:
    """A harness serves an obligation: by id, in its words, or by the equation it is about.

    An id that is not there is an error once obligations have ids. Other words are left: they may
    say the promise differently.
    """
    ids = {n for n in map(obligation_id, contract.proof_obligations) if n is not None}
    known = ids | {o.property for o in contract.proof_obligations} | set(contract.equations)
    n = len(contract.proof_obligations)
    for i, harness in enumerate(contract.kani_harnesses):
        name = harness.obligation
        found = _IDS.fullmatch(name)
        at: Key = ("kani_harnesses", i, "obligation")
        if name in known or document.full:
            continue
        if re.fullmatch(r"[a-z]\w*", name):
            message = f"expected an obligation or an equation, got {name!r}, which is not there"
            _dangling(document, message, at, name, set(contract.equations))
            continue
        if found is None:
            continue
        if ids:
            message = f"expected an obligation's id, got {name!r}, which none has"
            document.find("dangling-reference", message, at)
        elif not 1 <= int(found[2]) <= n:  # SM-INV-001: the first, where none has an id
            message = f"expected one of the {n} obligations, got {name!r}"
            document.find("dangling-reference", message, at, "warning")


def _applies_to(document: Document, contract: Contract) -> None:
    """All, an instruction set or device, or one of the contract's equations."""
    own = set(contract.equations)
    own |= set(contract.simd_dispatch) if isinstance(contract.simd_dispatch, dict) else set()
    for i, obligation in enumerate(contract.proof_obligations):
        name = obligation.applies_to
        if name is None or name.lower() in _TARGETS or not re.fullmatch(r"\w+", name):
            continue
        if name not in own and not document.full:
            message = f"expected all, an instruction set or an equation, got {name!r}"
            _dangling(document, message, ("proof_obligations", i, "applies_to"), name, own)


def _dangling(document: Document, message: str, at: Key, name: str, known: set[str]) -> None:
    """An error where something else was meant, else a warning: it may be another repository's."""
    near = difflib.get_close_matches(name[:100], sorted(known)[:MOST_NEAR], 1, NEAR)
    severity: Severity = "error" if near else "warning"
    hint = f"; did you mean {near[0]}?" if near else ""
    document.find("dangling-reference", message + hint, at, severity)
