"""Fetching a model from the hub into the cache that other tools use too.

Owns what the hub's client leaves out: a download that was cut off goes on where it stopped, also
in another process, and a file is in the cache only once its SHA-256 is the one the hub states.
"""

import errno
import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi, constants, errors, hf_hub_download, hf_hub_url
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers, tqdm

from isobit.errors import IsobitError, ModelRefused, UsageError
from isobit.hub.names import HubName, choose, listed, variants

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

_SHA256 = re.compile("[0-9a-f]{64}")
_STEP = 16 << 20  # bytes hashed at a time


def pull(name: HubName, note: Callable[[str], None] | None = None) -> Path:
    """Bring a model of the hub into the cache; its first file.

    What the cache has of that revision is not fetched again. ``note`` is told what was chosen.
    Raises ModelRefused for what is not on the hub, cannot be reached or comes damaged, UsageError
    where the disk has no room.
    """
    with _in_a_line(name):
        commit, files = _listing(name)
        there = variants(files)
        chosen = choose(name, there)
        sizes = {file: s.size or 0 for file, s in files.items()}
        if note is not None and name.file is None:
            note(f"{name}: {chosen.quant} of {listed(there, sizes)}")
        folder = Path(
            constants.HF_HUB_CACHE, repo_folder_name(repo_id=name.repo, repo_type="model")
        )
        missing = [s for f in chosen.files if (s := files[f]).lfs and not _blob(folder, s).exists()]
        _need_room(name, folder, missing)
        for sibling in missing:
            _download(name, folder, sibling)
        # The blobs are there; now the client gives them their names.
        paths = [
            Path(hf_hub_download(name.repo, file, revision=name.revision)) for file in chosen.files
        ]
    if any(commit not in path.parts for path in paths):
        raise ModelRefused(f"{name}: expected one revision, it changed meanwhile; pull again")
    return paths[0]


def _listing(name: HubName) -> tuple[str, dict[str, "RepoSibling"]]:
    """The commit and the files of a revision, as the hub states them.

    A digest becomes the name of a file here, so it must be one.
    """
    good = False
    with suppress(AttributeError, KeyError, TypeError):  # the client's, over what it was sent
        info = HfApi().model_info(name.repo, revision=name.revision, files_metadata=True)
        files = {s.rfilename: s for s in info.siblings or ()}
        good = all(
            isinstance(s.rfilename, str)
            and (s.size or 0) >= 0
            and (s.lfs is None or _SHA256.fullmatch(s.lfs.sha256) is not None)
            for s in files.values()
        )
    if not good:
        raise ModelRefused(
            f"{name}: expected the hub's list of files from {constants.ENDPOINT}, each with its "
            "size and SHA-256, got something else"
        )
    return str(info.sha), files


def _blob(folder: Path, sibling: "RepoSibling") -> Path:
    assert sibling.lfs is not None
    return folder / "blobs" / sibling.lfs.sha256


def _need_room(name: HubName, folder: Path, missing: list["RepoSibling"]) -> None:
    needed = sum(s.size or 0 for s in missing)
    for s in missing:
        partial = _blob(folder, s).with_suffix(".incomplete")
        needed -= partial.stat().st_size if partial.exists() else 0
    place = next(p for p in (folder, *folder.parents) if p.exists())
    if (free := shutil.disk_usage(place).free) < needed:
        raise UsageError(
            f"{name}: expected {needed / 1e9:.2f} GB of room in {place}, found "
            f"{free / 1e9:.2f} GB; HF_HUB_CACHE names another folder, isobit models what could go"
        )


def _download(name: HubName, folder: Path, sibling: "RepoSibling") -> None:
    """One file into the cache's blobs, checked."""
    blob, file = _blob(folder, sibling), sibling.rfilename
    lock = folder.parent / ".locks" / folder.name / f"{blob.name}.lock"
    for place in (lock, blob):
        place.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):  # which the client takes too
        if blob.exists():
            return
        partial = blob.with_suffix(".incomplete")
        with partial.open("ab") as out:
            if (sibling.size or 0) > constants.MAX_HTTP_DOWNLOAD_SIZE and not out.tell():
                raise ModelRefused(
                    f"{name}: {file}: expected a file of at most "
                    f"{constants.MAX_HTTP_DOWNLOAD_SIZE / 1e9:.0f} GB, got "
                    f"{(sibling.size or 0) / 1e9:.0f} GB; fetch it with: hf download "
                    f"{name.repo} {file}"
                )
            http_get(
                hf_hub_url(name.repo, file, revision=name.revision),
                out,
                resume_size=out.tell(),
                headers=build_hf_headers(),
                expected_size=sibling.size,
                displayed_filename=file,
            )
        if (got := _sha256(partial, file)) != blob.name:
            partial.unlink()
            raise ModelRefused(
                f"{name}: {file}: expected SHA-256 {blob.name}, got {got}; it came damaged and was "
                "removed, pull again"
            )
        partial.replace(blob)


def _sha256(path: Path, shown: str) -> str:
    digest = hashlib.sha256()
    size = path.stat().st_size
    bar = tqdm(  # type: ignore[no-untyped-call]
        total=size, desc=f"checking {shown}", unit="B", unit_scale=True, disable=None
    )  # None: no terminal, no bar
    with path.open("rb") as file, bar:
        while piece := file.read(_STEP):
            digest.update(piece)
            bar.update(len(piece))
    return digest.hexdigest()


@contextmanager
def _in_a_line(name: HubName) -> Iterator[None]:
    """What the hub's client raises, as one of isobit's errors."""
    page = f"{constants.ENDPOINT}/{name.repo}"
    try:
        yield
    except IsobitError:
        raise
    except errors.OfflineModeIsEnabled:
        raise ModelRefused(
            f"{name}: expected it in {constants.HF_HUB_CACHE}, not found; HF_HUB_OFFLINE is set"
        ) from None
    except errors.GatedRepoError:
        raise ModelRefused(
            f"{name}: expected access, got none; accept its terms at {page}, then hf auth login"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ModelRefused(
            f"{name}: expected a repository, found none at {page}; a private one needs: hf auth "
            "login"
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelRefused(f"{name}: expected revision {name.revision}, found none") from None
    except errors.HFValidationError as error:
        raise UsageError(f"{name}: expected a name of the hub, got: {_line(error)}") from None
    except errors.HfHubHTTPError as error:
        response = error.response
        raise ModelRefused(
            f"{name}: expected the hub's answer, got {response.status_code} "
            f"{response.reason_phrase} from {constants.ENDPOINT}"
        ) from None
    except (errors.HTTPError, errors.LocalEntryNotFoundError) as error:
        raise ModelRefused(
            f"{name}: expected to reach {constants.ENDPOINT}, got: {_line(error)}; what has come "
            "is kept, pull again"
        ) from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UsageError(
                f"{name}: expected room in {constants.HF_HUB_CACHE}, found none left; what has "
                "come is kept, make room and pull again"
            ) from None
        if error.errno is not None:
            raise UsageError(
                f"{error.filename or constants.HF_HUB_CACHE}: {error.strerror}"
            ) from None
        raise ModelRefused(f"{name}: {_line(error)}") from None
    except ValueError as error:  # an answer that is no JSON
        raise ModelRefused(
            f"{name}: expected the hub's answer from {constants.ENDPOINT}, got: {_line(error)}"
        ) from None


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
