"""The WebGPU device: finding an adapter, buffers, compiled kernels and passes.

Knows nothing of models. A kernel is an entry point of a ``.wgsl`` file of this folder; the files it
builds on are put in front of it. Its bindings are group 0: the opaque zero and the dispatch's
parameters, group 1: its buffers, in order.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isobit.errors import BackendUnavailable

INSTALL = "pip install 'isobit[wgpu]'"
DRIVER = "install a Vulkan driver (software: apt-get install mesa-vulkan-drivers libvulkan1)"

_PREFERRED = ("DiscreteGPU", "IntegratedGPU", "VirtualGPU", "CPU", "Unknown")
_BINDING = re.compile(r"@group\(1\) @binding\((\d+)\) var<storage, (read|read_write)>")
_PARAMETER_BYTES = 64
_PARAMETER_STRIDE = 256  # the largest alignment that a device may ask for


def adapters() -> list[Any]:
    """Adapters that can compute, fastest kind first; empty if there is none.

    Raises BackendUnavailable if the wgpu package is missing.
    """
    try:
        import wgpu  # noqa: PLC0415
    except ImportError as error:
        raise BackendUnavailable(
            f"wgpu: the package is not installed ({error}): {INSTALL}"
        ) from None
    # OpenGL shows the same devices again, with fewer abilities.
    found = [a for a in wgpu.gpu.enumerate_adapters_sync() if a.info["backend_type"] != "OpenGL"]
    return sorted(found, key=lambda a: _PREFERRED.index(a.info["adapter_type"]))


def describe(adapter: Any) -> str:
    """An adapter in words: its name, driver and interface."""
    info = adapter.info
    return f"{info['device']}, {info['description']} ({info['backend_type']})"


@dataclass(frozen=True, eq=False)
class Kernel:
    """A compiled entry point and the layout of its buffers."""

    name: str
    pipeline: Any
    layout: Any


class Device:
    """An opened adapter with its compiled kernels."""

    def __init__(self, adapter: Any) -> None:
        import wgpu  # noqa: PLC0415

        self.name = describe(adapter)
        self._usage = wgpu.BufferUsage
        self._visible = wgpu.ShaderStage.COMPUTE
        self._device = adapter.request_device_sync()
        self._modules: dict[tuple[str, ...], tuple[Any, str]] = {}
        self._kernels: dict[tuple[str, ...], Kernel] = {}
        self._zero = self.upload(np.zeros(4, np.uint32), uniform=True)
        uniform = {"type": "uniform"}
        self._layout0 = self._device.create_bind_group_layout(
            entries=[
                {"binding": 0, "visibility": self._visible, "buffer": uniform},
                {
                    "binding": 1,
                    "visibility": self._visible,
                    "buffer": uniform | {"has_dynamic_offset": True},
                },
            ]
        )

    def upload(self, data: NDArray[np.generic], *, uniform: bool = False) -> Any:
        """A buffer holding the bytes of ``data``."""
        u = self._usage
        usage = (u.UNIFORM if uniform else u.STORAGE) | u.COPY_SRC | u.COPY_DST
        return self._device.create_buffer_with_data(data=np.ascontiguousarray(data), usage=usage)

    def empty(self, nbytes: int) -> Any:
        """A zeroed buffer."""
        u = self._usage
        return self._device.create_buffer(size=nbytes, usage=u.STORAGE | u.COPY_SRC | u.COPY_DST)

    def read(self, buffer: Any, dtype: type[np.generic]) -> NDArray[Any]:
        """A buffer's contents, once everything submitted before has run."""
        return np.frombuffer(self._device.queue.read_buffer(buffer), dtype)

    def kernel(self, files: Sequence[str], entry: str) -> Kernel:
        """Compile (once) an entry point of the last of ``files``, which build on each other."""
        key = (*files, entry)
        if key not in self._kernels:
            module, source = self._module(tuple(files))
            layout = self._device.create_bind_group_layout(
                entries=[
                    {
                        "binding": int(number),
                        "visibility": self._visible,
                        "buffer": {
                            "type": "storage" if access == "read_write" else "read-only-storage"
                        },
                    }
                    for number, access in _BINDING.findall(source)
                ]
            )
            pipeline = self._device.create_compute_pipeline(
                layout=self._device.create_pipeline_layout(
                    bind_group_layouts=[self._layout0, layout]
                ),
                compute={"module": module, "entry_point": entry},
            )
            self._kernels[key] = Kernel(f"{files[-1]}.{entry}", pipeline, layout)
        return self._kernels[key]

    def _module(self, files: tuple[str, ...]) -> tuple[Any, str]:
        if files not in self._modules:
            source = "\n".join(self.source(stem) for stem in files)
            self._modules[files] = (self._device.create_shader_module(code=source), source)
        return self._modules[files]

    def source(self, stem: str) -> str:
        """The text of ``stem.wgsl``."""
        return resources.files(__package__).joinpath(f"{stem}.wgsl").read_text("utf-8")

    def start(self) -> "Pass":
        """Begin recording dispatches."""
        return Pass(self)


class Pass:
    """Dispatches recorded in order and submitted together."""

    def __init__(self, device: Device) -> None:
        self._owner = device
        self._device = device._device
        self._recorded: list[tuple[Kernel, Any, tuple[int, ...]]] = []
        self._parameters: list[Sequence[int]] = []

    def run(
        self, kernel: Kernel, buffers: Sequence[Any], parameters: Sequence[int], *groups: int
    ) -> None:
        """Record a dispatch: parameters are up to 16 words, groups up to 3 counts."""
        entries = [
            {"binding": i, "resource": {"buffer": b, "offset": 0, "size": b.size}}
            for i, b in enumerate(buffers)
        ]
        group = self._device.create_bind_group(layout=kernel.layout, entries=entries)
        self._recorded.append((kernel, group, groups))
        self._parameters.append(parameters)

    def submit(self) -> None:
        """Run everything recorded, in one submission."""
        words = np.zeros((len(self._parameters), _PARAMETER_STRIDE // 4), np.uint32)
        for row, parameters in zip(words, self._parameters, strict=True):
            row[: len(parameters)] = parameters
        parameter_buffer = self._owner.upload(words, uniform=True)
        group0 = self._device.create_bind_group(
            layout=self._owner._layout0,
            entries=[
                {"binding": 0, "resource": {"buffer": self._owner._zero, "offset": 0, "size": 16}},
                {
                    "binding": 1,
                    "resource": {
                        "buffer": parameter_buffer,
                        "offset": 0,
                        "size": _PARAMETER_BYTES,
                    },
                },
            ],
        )
        encoder = self._device.create_command_encoder()
        compute = encoder.begin_compute_pass()
        for i, (kernel, group, groups) in enumerate(self._recorded):
            compute.set_pipeline(kernel.pipeline)
            compute.set_bind_group(0, group0, [i * _PARAMETER_STRIDE])
            compute.set_bind_group(1, group)
            compute.dispatch_workgroups(*groups)
        compute.end()
        self._device.queue.submit([encoder.finish()])
