"""How much of a GPU's memory is free. WebGPU does not say: the Vulkan loader is asked beside it,
by VK_EXT_memory_budget."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from isobit.backends.base import Memory

_LOADER = {"win32": "vulkan-1.dll"}.get(sys.platform, "libvulkan.so.1")
_EXTENSION = b"VK_EXT_memory_budget"
_DEVICE_LOCAL = 1  # VK_MEMORY_HEAP_DEVICE_LOCAL_BIT
_PROPERTIES_BYTES = 4096  # more than VkPhysicalDeviceProperties has


class _Application(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int32),
        ("next", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("version", ctypes.c_uint32),
        ("engine", ctypes.c_char_p),
        ("engine_version", ctypes.c_uint32),
        ("api", ctypes.c_uint32),
    )


class _Instance(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int32),
        ("next", ctypes.c_void_p),
        ("flags", ctypes.c_uint32),
        ("application", ctypes.POINTER(_Application)),
        ("layer_count", ctypes.c_uint32),
        ("layers", ctypes.c_void_p),
        ("extension_count", ctypes.c_uint32),
        ("extensions", ctypes.c_void_p),
    )


class _Extension(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char * 256), ("version", ctypes.c_uint32))


class _Budget(ctypes.Structure):
    """VkPhysicalDeviceMemoryBudgetPropertiesEXT."""

    _fields_ = (
        ("type", ctypes.c_int32),
        ("next", ctypes.c_void_p),
        ("budget", ctypes.c_uint64 * 16),
        ("usage", ctypes.c_uint64 * 16),
    )


class _Heap(ctypes.Structure):
    _fields_ = (("size", ctypes.c_uint64), ("flags", ctypes.c_uint32))


class _Heaps(ctypes.Structure):
    """VkPhysicalDeviceMemoryProperties2."""

    _fields_ = (
        ("type", ctypes.c_int32),
        ("next", ctypes.c_void_p),
        ("type_count", ctypes.c_uint32),
        ("types", ctypes.c_uint32 * 64),
        ("count", ctypes.c_uint32),
        ("heaps", _Heap * 16),
    )


def memory_of(vendor: int, device: int) -> Memory | None:
    """A GPU's own memory, by its PCI numbers: what this process may still take of it, and all of
    it. Of several GPUs alike, that of the one that has least. None where nobody says."""
    try:
        with _devices() as (vulkan, found):
            of = [_memory(vulkan, d) for d in found if _identity(vulkan, d) == (vendor, device)]
    except (OSError, AttributeError):  # no loader, or one that is older than Vulkan 1.1
        return None
    known = [m for m in of if m is not None]
    return min(known, key=lambda m: m.free) if known else None


@contextmanager
def _devices() -> Iterator[tuple[ctypes.CDLL, list[ctypes.c_void_p]]]:
    vulkan, instance, count = ctypes.CDLL(_LOADER), ctypes.c_void_p(), ctypes.c_uint32()
    application = _Application(type=0, name=b"isobit", api=1 << 22 | 1 << 12)  # Vulkan 1.1
    made = _Instance(type=1, application=ctypes.pointer(application))
    if vulkan.vkCreateInstance(ctypes.byref(made), None, ctypes.byref(instance)):
        raise OSError("no Vulkan instance")
    try:
        vulkan.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), None)
        devices = (ctypes.c_void_p * count.value)()
        vulkan.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), devices)
        yield vulkan, [ctypes.c_void_p(d) for d in devices[: count.value] if d]
    finally:
        vulkan.vkDestroyInstance(instance, None)


def _identity(vulkan: ctypes.CDLL, device: ctypes.c_void_p) -> tuple[int, int]:
    words = (ctypes.c_uint32 * (_PROPERTIES_BYTES // 4))()
    vulkan.vkGetPhysicalDeviceProperties(device, words)
    return words[2], words[3]  # behind the versions of the interface and the driver


def _memory(vulkan: ctypes.CDLL, device: ctypes.c_void_p) -> Memory | None:
    count = ctypes.c_uint32()
    vulkan.vkEnumerateDeviceExtensionProperties(device, None, ctypes.byref(count), None)
    has = (_Extension * count.value)()
    vulkan.vkEnumerateDeviceExtensionProperties(device, None, ctypes.byref(count), has)
    if _EXTENSION not in {e.name for e in has}:
        return None
    budget = _Budget(type=1000237000)
    heaps = _Heaps(type=1000059006, next=ctypes.addressof(budget))
    vulkan.vkGetPhysicalDeviceMemoryProperties2(device, ctypes.byref(heaps))
    of = [
        Memory(max(0, budget.budget[i] - budget.usage[i]), heaps.heaps[i].size)
        for i in range(heaps.count)
        if heaps.heaps[i].flags & _DEVICE_LOCAL
    ]
    return max(of, key=lambda m: m.total, default=None)
