"""How a kernel is launched, as the driver takes it."""

from typing import Any


def launch_config(
    driver: Any,
    stream: Any,
    grid: tuple[int, ...],
    threads: int,
    shared: int,
    cooperative: bool = False,
    overlap: bool = False,
) -> Any:
    """So many blocks of so many threads, each with so many bytes of shared memory.

    overlap: it may start before the kernel ahead of it has ended, and waits where it must.
    """
    config, kinds = driver.CUlaunchConfig(), driver.CUlaunchAttributeID
    config.gridDimX, config.gridDimY, config.gridDimZ = (*grid, 1, 1)[:3]
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes, config.hStream = shared, stream
    attributes = []
    if cooperative:
        attributes.append(driver.CUlaunchAttribute())
        attributes[-1].id = kinds.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
        attributes[-1].value.cooperative = 1
    if overlap:
        attributes.append(driver.CUlaunchAttribute())
        attributes[-1].id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attributes[-1].value.programmaticStreamSerializationAllowed = 1
    config.attrs, config.numAttrs = attributes, len(attributes)
    return config
