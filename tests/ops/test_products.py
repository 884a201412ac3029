"""Cases of products on every backend: see test_cases.py, beside which they run."""

from .cases import products
from .ways import a_test_of

test_product = a_test_of(*products.CASES)
