"""The cases of every operation, a file a family."""

from tests.ops.cases import attention, norms, pointwise, products, recurrent, routing, views
from tests.ops.harness import Case

CASES: tuple[Case, ...] = (
    *products.CASES,
    *norms.CASES,
    *pointwise.CASES,
    *attention.CASES,
    *routing.CASES,
    *recurrent.CASES,
    *views.CASES,
)
