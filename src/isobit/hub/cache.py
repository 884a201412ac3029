"""The models that lie in the hub's cache: found by name, listed, removed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, scan_cache_dir
from huggingface_hub.errors import CacheNotFound
from huggingface_hub.file_download import repo_folder_name

from isobit.errors import ModelRefused, UsageError
from isobit.hub.names import HubName, Variant, choose, variants


@dataclass(frozen=True)
class Cached:
    """A model in the cache."""

    name: HubName
    files: tuple[str, ...]
    """In the repository."""
    paths: tuple[Path, ...]
    """The same files on this machine."""
    blobs: frozenset[Path]
    nbytes: int


def cached(name: HubName, note: Callable[[str], None] | None = None) -> Path | None:
    """The first file of a model in the cache; None if it is not there whole. Asks no network."""
    repo = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name.repo, repo_type="model"))
    ref = repo / "refs" / name.revision
    try:
        commit = ref.read_text().strip() if ref.is_file() else ""
        snapshot = repo / "snapshots" / (commit or name.revision)  # never all of them
        files = [p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*") if p.is_file()]
        there = variants(files)
        chosen = choose(name, there)
    except (OSError, UnicodeDecodeError, ModelRefused):
        return None
    if note is not None and name.file is None and name.quant is None:
        note(f"{name}: {chosen.quant}, which is here")
    return snapshot / chosen.files[0]


def models() -> list[Cached]:
    """Every model of the hub in the cache, by name. Raises UsageError if it is no folder."""
    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return []
    except ValueError:
        raise UsageError(
            f"HF_HUB_CACHE: expected a folder, found {constants.HF_HUB_CACHE}, which is a file"
        ) from None
    found = []
    for repo in repos:
        for revision in repo.revisions if repo.repo_type == "model" else ():
            files = {
                f.file_path.relative_to(revision.snapshot_path).as_posix(): f
                for f in revision.files
            }
            rev = "main" if "main" in revision.refs else revision.commit_hash
            there = variants(files)
            for v in there:
                parts = [files[f] for f in v.files]
                found.append(
                    Cached(
                        _named(repo.repo_id, rev, v, there),
                        v.files,
                        tuple(f.file_path for f in parts),
                        frozenset(f.blob_path for f in parts),
                        sum(f.size_on_disk for f in parts),
                    )
                )
    return sorted(found, key=lambda m: str(m.name))


def _named(repo: str, revision: str, v: Variant, there: list[Variant]) -> HubName:
    """The shortest name that means it and nothing else."""
    if sum(other.quant == v.quant for other in there) == 1:
        return HubName(repo, revision, quant=v.quant)
    return HubName(repo, revision, file=v.files[0])


def remove(name: HubName) -> list[Cached]:
    """Remove what a name means from the cache; a name without a quantisation, all of that
    repository's models. Returns what was removed. Raises ModelRefused if nothing was there.
    """
    there = [m for m in models() if m.name.repo == name.repo and m.name.revision == name.revision]
    wanted = [
        m
        for m in there
        if (name.quant is None or (m.name.quant or "").lower() == name.quant.lower())
        and (name.file is None or name.file in m.files)
    ]
    if not wanted:
        have = ", ".join(str(m.name) for m in there) or "none of that name"
        raise ModelRefused(f"{name}: expected a model of the cache, found {have}; isobit models")
    for m in wanted:
        for path in m.paths:
            path.unlink()
    still = {blob for m in models() for blob in m.blobs}  # of another revision
    for m in wanted:
        for blob in m.blobs - still:
            blob.unlink(missing_ok=True)
    return wanted
