"""The CUDA backend: one NVIDIA GPU, Ampere or newer, kernels compiled by NVRTC."""

from isobit.backends.cuda.backend import CudaBackend
from isobit.backends.cuda.gpu import available
from isobit.backends.cuda.load import lacks

__all__ = ["CudaBackend", "available", "lacks"]
