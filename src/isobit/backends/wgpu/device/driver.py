"""Whether a driver returns the specification's bits: the self-test's verdict, kept on disk.

The test takes seconds; its outcome stands in the user's cache directory under a name made of the
adapter, its driver, the wgpu package and the code that was tested.
"""

import contextlib
import hashlib
import json
import os
from importlib import metadata, resources
from pathlib import Path

from isobit.backends.wgpu.device import selftest
from isobit.backends.wgpu.device.gpu import Device
from isobit.errors import BackendUnavailable

_TESTED = (
    *("device/selftest.py", "device/selftest.wgsl"),
    *("kernels/scalar.wgsl", "kernels/reduce.wgsl"),
)
_FILES = resources.files("isobit.backends.wgpu")


def failures(device: Device) -> dict[str, str]:
    """Primitives that differ from the specification, and how; empty for an exact driver."""
    place = _directory() / f"{_key(device)}.json"
    with contextlib.suppress(OSError, ValueError):
        kept = json.loads(place.read_text("utf-8"))
        if isinstance(kept, dict) and all(isinstance(v, str) for v in kept.values()):
            return kept
    with device.guarded():
        found = {
            f.primitive: f"{f.differing} of {f.cases} cases differ, the first: {f.example}"
            for f in selftest.run(device)
            if f.differing
        }
    with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
        place.parent.mkdir(parents=True, exist_ok=True)
        unfinished = place.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(found), "utf-8")
        unfinished.replace(place)
    return found


def require_exact(device: Device, *, allow_inexact: bool) -> tuple[str, ...]:
    """Refuse a driver that is not exact, naming it and the primitive that fails.

    With ``allow_inexact``, returns the failing primitives instead; empty for an exact driver.
    """
    failed = failures(device)
    if failed and not allow_inexact:
        name, how = next(iter(failed.items()))
        more = f"; {len(failed) - 1} more primitives fail" if len(failed) > 1 else ""
        raise BackendUnavailable(
            f"wgpu: {device.name} does not compute the specification's bits: {name}: {how}{more} "
            "(--allow-inexact runs it all the same and marks what comes out)"
        )
    return tuple(failed)


def _key(device: Device) -> str:
    digest = hashlib.sha256()
    for file in (*_TESTED, f"kernels/{device.dot}.wgsl"):
        digest.update(_FILES.joinpath(file).read_bytes())
    digest.update(repr((device.name, device.identity, metadata.version("wgpu"))).encode())
    return digest.hexdigest()[:32]


def _directory() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "isobit" / "wgpu"
