"""Cores and memory within control groups of both versions; the files are the test's own."""

import math
from pathlib import Path

import pytest

from isobit import machine
from isobit.backends import hardware

GB = 1 << 30


def tree(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    """A root folder of a process that says so of its control groups."""
    files = {"proc/self/cgroup": cgroup, "proc/meminfo": f"MemAvailable: {8 * GB >> 10} kB"} | files
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    return root


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("0::/", {}, 8),
        ("0::/a/b", {"sys/fs/cgroup/a/b/cpu.max": "max 100000"}, 8),
        ("0::/a/b", {"sys/fs/cgroup/a/b/cpu.max": "250000 100000"}, 2),
        ("0::/a/b", {"sys/fs/cgroup/a/b/x": "", "sys/fs/cgroup/a/cpu.max": "300000 100000"}, 3),
        ("0::/a/b", {"sys/fs/cgroup/cpu.max": "100000 50000"}, 2),  # sees itself at the top
        ("0::/", {"sys/fs/cgroup/cpu.max": "20000 100000"}, 1),
        ("0::/", {"sys/fs/cgroup/cpu.max": "1600000 100000"}, 8),
        ("0::/", {"sys/fs/cgroup/cpu.max": "nonsense"}, 8),
        (
            "4:cpu,cpuacct:/a",
            {
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "400000",
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000",
            },
            4,
        ),
        (
            "1:cpu:/elsewhere",
            {
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            8,
        ),
    ],
)
def test_cores(tmp_path: Path, cgroup: str, files: dict[str, str], expected: int) -> None:
    assert machine.cores(tree(tmp_path, cgroup, files)) == expected


def test_cores_of_the_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3})
    assert machine.cores(tree(tmp_path, "0::/", {"sys/fs/cgroup/cpu.max": "400000 100000"})) == 1


@pytest.mark.parametrize(
    ("cgroup", "files", "total", "free"),
    [
        ("0::/", {}, math.inf, 8 * GB),
        (
            "0::/a",
            {
                "sys/fs/cgroup/a/memory.max": str(4 * GB),
                "sys/fs/cgroup/a/memory.current": str(3 * GB),
                "sys/fs/cgroup/a/memory.stat": f"anon {GB}\nfile {2 * GB}",
            },
            4 * GB,
            3 * GB,
        ),
        (
            "0::/a",
            {"sys/fs/cgroup/a/memory.max": "max", "sys/fs/cgroup/a/memory.current": "1"},
            math.inf,
            8 * GB,
        ),
        (
            "4:memory:/a",
            {
                "sys/fs/cgroup/memory/a/memory.limit_in_bytes": str(2 * GB),
                "sys/fs/cgroup/memory/a/memory.usage_in_bytes": str(3 * GB),
                "sys/fs/cgroup/memory/a/memory.stat": "total_cache 0",
            },
            2 * GB,
            0,
        ),
        (
            "4:memory:/a",  # the highest number there is stands for no limit
            {
                "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "9223372036854771712",
                "sys/fs/cgroup/memory/a/memory.usage_in_bytes": str(3 * GB),
            },
            math.inf,
            8 * GB,
        ),
    ],
)
def test_memory(
    tmp_path: Path, cgroup: str, files: dict[str, str], total: float, free: float
) -> None:
    root = tree(tmp_path, cgroup, files)
    assert machine.total_memory(root) == min(total, machine.total_memory(tmp_path / "none"))
    assert machine.free_memory(root) == free


def test_a_system_that_says_nothing(tmp_path: Path) -> None:
    assert machine.free_memory(tmp_path) == math.inf
    assert machine.cores(tmp_path) == 8


def test_this_machine() -> None:
    assert machine.cores() >= 1
    assert 0 < machine.free_memory() <= machine.total_memory() + GB


def test_a_machine_without_a_device_file_of_a_gpu_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What auto asks first, so that a start without a GPU loads no library of one."""
    libraries: list[str] = []

    def load(name: str) -> None:
        libraries.append(name)
        raise OSError

    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("isobit.backends.hardware.ctypes.CDLL", load)
    monkeypatch.setattr("isobit.backends.hardware._DEV", tmp_path)
    (tmp_path / "tty0").touch()
    assert not hardware.may_have_gpu()
    assert libraries == ["libcuda.so.1"]
    for name in ("nvidia0", "nvidiactl", "dri/renderD128", "dxg", "kfd", "mali0", "nvhost-gpu"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        assert hardware.may_have_gpu(), name
        (tmp_path / name).unlink()
    assert not hardware.may_have_gpu()
    monkeypatch.setattr("isobit.backends.hardware.ctypes.CDLL", lambda _: None)
    assert hardware.may_have_gpu(), "a driver may reach a GPU elsewhere"
    monkeypatch.setattr("sys.platform", "darwin")
    assert hardware.may_have_gpu()
