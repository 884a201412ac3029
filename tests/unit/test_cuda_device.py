"""The CUDA backend's host side, in parts that need no device."""

import os
from types import SimpleNamespace

import pytest

from isobit.backends.cuda.device import compile
from isobit.backends.cuda.device.compile import Signature
from isobit.backends.cuda.device.gpu import CudaGpu
from isobit.backends.cuda.device.pinned import PinnedBuffers
from isobit.errors import BackendUnavailable
from tests.helpers.expected import needs


def test_memory_that_is_referred_to_is_not_lent_again():
    known = []
    lent = PinnedBuffers(known.append, known.remove)
    first = lent(100)
    first[:] = 1
    view, at = first.reshape(10, 10)[3:5], first.ctypes.data
    del first
    second = lent(100)
    second[:] = 2
    assert (view == 1).all()
    assert second.ctypes.data != at
    del view
    assert lent(100).ctypes.data == at
    assert len(known) == 2


def test_memory_that_is_lent_out_is_bounded():
    known = []
    lent = PinnedBuffers(known.append, known.remove)
    held = [lent(n) for n in range(10, 30)]
    for n, array in enumerate(held):
        array[:] = n
    assert all((array == n).all() for n, array in enumerate(held))
    assert len(known) == 8


def test_a_result_of_another_size_finds_a_buffer_once_one_is_free():
    """As logits of 31 rows do after eight other numbers of rows."""
    known = {}
    lent = PinnedBuffers(
        lambda b: known.update({b.ctypes.data: b.size}), lambda b: known.pop(b.ctypes.data)
    )
    for n in range(10, 50):
        assert known[lent(n).ctypes.data] == n
    assert sorted(known.values()) == [*range(42, 50)]
    for n in (45, 3):
        array = lent(n)
        assert array.size == n
        assert known[array.ctypes.data] >= n
    assert len(known) == 8


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    needs("nvrtc", "cuda.bindings.nvrtc")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    times = []
    compiler = compile._compile
    monkeypatch.setattr(compile, "_compile", lambda *a: times.append(a) or compiler(*a))
    return tmp_path, times


def test_a_compiled_file_is_used_again_unless_it_is_cut_off(compiled):
    folder, times = compiled
    code = compile.cubin("ops/silu", "sm_90", {"PLANES": "2"})
    assert compile.cubin("ops/silu", "sm_90", {"PLANES": "2"}) == code
    assert len(times) == 1
    (kept,) = folder.rglob("*.cubin")
    kept.write_bytes(kept.read_bytes()[: kept.stat().st_size // 2])
    assert compile.cubin("ops/silu", "sm_90", {"PLANES": "2"}) == code
    assert len(times) == 2


def test_another_option_is_another_file(compiled, monkeypatch):
    options = compile._options
    compile.cubin("ops/silu", "sm_90", {})
    monkeypatch.setattr(compile, "_options", lambda *a: [*options(*a), "--restrict"])
    compile.cubin("ops/silu", "sm_90", {})
    assert len(compiled[1]) == 2


def test_a_compiler_that_fails_is_no_traceback(compiled, monkeypatch):
    from cuda.bindings import nvrtc  # noqa: PLC0415

    failed = nvrtc.nvrtcResult.NVRTC_ERROR_OUT_OF_MEMORY
    monkeypatch.setattr(nvrtc, "nvrtcCreateProgram", lambda *_: (failed, None))
    with pytest.raises(BackendUnavailable, match=r"ops/silu\.cu for sm_90 .*OUT_OF_MEMORY$"):
        compile.cubin("ops/silu", "sm_90", {})


@pytest.mark.parametrize("raises", [False, True])
def test_a_kernel_that_was_not_queued_is_said_once(raises):
    def launch(*_):
        if raises:
            raise OverflowError("broken")
        return (719,)

    driver = SimpleNamespace(CUresult=SimpleNamespace(CUDA_SUCCESS=0), cuLaunchKernelEx=launch)
    driver.cuGetErrorString = lambda _: (0, b"broken")
    gpu = object.__new__(CudaGpu)
    vars(gpu).update(_driver=driver, _asked=None, _queues=True, _overlaps=True)
    vars(gpu).update(_config=lambda *_: None, _kernel=lambda *_: (None, Signature("32", ())))
    with pytest.raises(BackendUnavailable, match=r"^cuda: broken \(when add was queued; [^()]*\)$"):
        gpu.launch("ops/add", "add", (1,), ())


def test_another_compiler_is_another_file(compiled, monkeypatch):
    from cuda.bindings import nvrtc  # noqa: PLC0415

    compile.cubin("ops/silu", "sm_90", {})
    _, major, minor = nvrtc.nvrtcVersion()
    monkeypatch.setattr(nvrtc, "nvrtcVersion", lambda: (0, major, minor + 1))
    compile.cubin("ops/silu", "sm_90", {})
    folder, times = compiled
    assert len(times) == len(list(folder.rglob("*.cubin"))) == 2


def test_a_forked_process_is_refused_in_one_line(monkeypatch):
    gpu = CudaGpu.__new__(CudaGpu)
    gpu._process, gpu._closed = os.getpid(), False
    gpu._driver, gpu._context = SimpleNamespace(), None
    monkeypatch.setattr(os, "getpid", lambda: gpu._process + 1)
    with pytest.raises(BackendUnavailable, match=r"^cuda: this process was forked .* spawn\)$"):
        gpu.activate()
    gpu.close()  # frees nothing, which is not its own
