"""How long the GPU takes for launches that are replayed as a graph."""

import numpy as np
from cuda.bindings import driver


def ok(result):
    """What a driver's call gave, if it succeeded."""
    assert result[0] == driver.CUresult.CUDA_SUCCESS, result
    return result[1] if len(result) == 2 else result[1:]


def milliseconds(gpu, graph, repeats=11):
    """Of one replay of a graph (CudaGpu.capture), the median."""
    stream, times = gpu._stream, []
    a, b = (ok(driver.cuEventCreate(0)) for _ in range(2))
    for _ in range(repeats):
        ok(driver.cuEventRecord(a, stream))
        gpu.replay(graph)
        ok(driver.cuEventRecord(b, stream))
        ok(driver.cuEventSynchronize(b))
        times.append(ok(driver.cuEventElapsedTime(a, b)))
    for event in (a, b):
        ok(driver.cuEventDestroy(event))
    return float(np.median(times))
