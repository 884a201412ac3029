"""The CUDA backend: one NVIDIA GPU, Ampere or newer, kernels compiled by NVRTC."""

from isobit.backends.cuda.backend import CudaBackend, UnfusedCudaBackend
from isobit.backends.cuda.device.driver import available
from isobit.backends.cuda.graph import lacks

__all__ = ["CudaBackend", "UnfusedCudaBackend", "available", "lacks"]
