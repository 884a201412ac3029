"""Every case on every backend: the specification's bits, and nothing written beside them.

A backend refuses the cases that say so, and no others.
"""

import pytest

from isobit.errors import BackendUnavailable

from .cases import CASES
from .harness import Case, check, matrix, refusal, specified
from .ways import WAYS


@pytest.mark.parametrize(
    ("case", "way"),
    [pytest.param(case, way, id=f"{way} {case.name}") for case, way in matrix(CASES, WAYS)],
)
def test_case(case: Case, way: str) -> None:
    wanted, _ = specified(case)
    expected = refusal(case, way)
    try:
        with WAYS[way](wanted.weights, wanted.engine) as (backend, intact):
            check(case, backend, intact)
    except BackendUnavailable as said:
        if expected is None or expected not in str(said):
            raise
        pytest.skip(f"unsupported: {said}")
    assert expected is None, "it was said to be unsupported"
