"""Cases of all operations but products on every backend: the specification's bits, and nothing
written beside them. A backend refuses the cases that say so, and no others."""

from .cases import attention, norms, pointwise, recurrent, routing, views
from .ways import a_test_of

test_case = a_test_of(
    *norms.CASES,
    *pointwise.CASES,
    *attention.CASES,
    *routing.CASES,
    *recurrent.CASES,
    *views.CASES,
)
