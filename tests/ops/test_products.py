"""Cases of products on every backend: see test_cases.py, beside which they run."""

from .cases import products
from .ways import tested

test_product = tested(*products.CASES)
