"""The wgpu backend: the same bits on every GPU that WebGPU reaches."""

from isobit.backends.wgpu.backend import WgpuBackend
from isobit.backends.wgpu.device.gpu import available
from isobit.backends.wgpu.graph import lacks

__all__ = ["WgpuBackend", "available", "lacks"]
