"""Weight matrices, handed to the extension."""

import numpy as np

from isobit.backends.cpu import _cpu
from isobit.numerics import Weight


def matrix(w: Weight) -> _cpu.Matrix:
    """A weight matrix, or a stack of them, as the extension takes it: a view, no copy, unless rows
    lie apart in the file."""
    *stack, rows, columns = w.shape
    data = np.ascontiguousarray(w.data).reshape(-1)
    return _cpu.Matrix(data, w.format.ggml_type, int(np.prod(stack)), rows, columns, w.row_bytes)
