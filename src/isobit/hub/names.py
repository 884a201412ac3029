"""Names of models on the hub, and which of a repository's files a name means.

Owns the choice of a quantisation where none is named.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from isobit.errors import ModelRefused, UsageError

SCHEME = "hf://"

_NAME = re.compile(
    r"hf://(?P<repo>\w(?:[\w.-]*\w)?/\w(?:[\w.-]{0,94}\w)?)(?:@(?P<revision>[\w./-]+?))?"
    r"(?:/(?P<file>[\w./ +-]+\.gguf))?(?::(?P<quant>[\w.-]+))?",
    re.ASCII,
)
_NO_REPO = re.compile(r"--|\.\.|\.git$")  # what the hub allows in no name of a repository
_HUB_LIKE = re.compile(  # no part is longer than a name of a file can be
    r"(?:https://huggingface\.co/)?[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}(?::[\w.-]+)?"
)
_PART = re.compile(r"-(\d{5})-of-(\d{5})$")
_QUANT = re.compile(
    r"(?:^|[-._/])((?:UD-)?(?:I?Q[1-9]_\w+|TQ[12]_0|MXFP4(?:_MOE)?|NVFP4|BF16|F16|FP16|F32))"
    r"(?=$|[-./])",
    re.IGNORECASE,
)
_NO_MODELS = ("mmproj", "imatrix")  # what lies beside a model: images' encoder, statistics

PREFERRED = (
    *("Q4_K_M", "UD-Q4_K_M", "UD-Q4_K_XL", "Q4_K_S", "MXFP4", "MXFP4_MOE", "Q4_0", "Q5_K_M"),
    *("Q6_K", "Q8_0", "Q3_K_M", "BF16", "F16"),
)
"""Quantisations to take where none is named, the first that there is."""


@dataclass(frozen=True)
class HubName:
    """A model of the hub, as it was named."""

    repo: str
    revision: str = "main"
    file: str | None = None
    quant: str | None = None

    @classmethod
    def parse(cls, text: str) -> "HubName":
        """Read ``hf://ORG/REPO[@REVISION][/FILE.gguf][:QUANT]``. Raises UsageError."""
        found = _NAME.fullmatch(text)
        dotted = found is not None and any(
            set(part) == {"."} for part in re.split(r"[/@]", text.removeprefix(SCHEME)) if part
        )
        if found is None or dotted or _NO_REPO.search(found["repo"]):
            raise UsageError(
                f"model: expected hf://ORG/REPO, hf://ORG/REPO:QUANT or hf://ORG/REPO/FILE.gguf, "
                f"got {text[:200]!r}"
            )
        return cls(found["repo"], found["revision"] or "main", found["file"], found["quant"])

    def __str__(self) -> str:
        revision = "" if self.revision == "main" else f"@{self.revision}"
        file = "" if self.file is None else f"/{self.file}"
        quant = "" if self.quant is None else f":{self.quant}"
        return f"{SCHEME}{self.repo}{revision}{file}{quant}"


@dataclass(frozen=True)
class Variant:
    """One model of a repository: all files of one quantisation."""

    quant: str
    """As its file name says; of a name that says nothing, the name."""
    files: tuple[str, ...]
    """In order, if it is split."""


def looks_like_hub(text: str) -> bool:
    """Whether a name that is no file may have been meant as one of the hub."""
    return _HUB_LIKE.fullmatch(text) is not None and not text.endswith(".gguf")


def variants(files: Iterable[str]) -> list[Variant]:
    """The models among a repository's files.

    Those lacking a part are left out, and those whose name no line could show.
    """
    groups: dict[tuple[str, int], list[str]] = {}
    for file in sorted(filter(str.isprintable, files)):
        base = file.rpartition("/")[2].lower()
        if base.endswith(".gguf") and not base.startswith(_NO_MODELS):
            stem = file[: -len(".gguf")]
            part = _PART.search(stem)
            key = (stem, 1) if part is None else (stem[: part.start()], int(part[2]))
            groups.setdefault(key, []).append(file)
    return [
        Variant(_quant(stem), tuple(parts))
        for (stem, count), parts in groups.items()
        if len(parts) == count
    ]


def _quant(stem: str) -> str:
    found = _QUANT.findall(stem)
    return str(found[-1]).upper() if found else stem.rpartition("/")[2]


def choose(name: HubName, among: Iterable[Variant]) -> Variant:
    """The model that a name means. Raises ModelRefused, saying what there is."""
    there = list(among)
    if name.file is not None:
        wanted = [v for v in there if name.file in v.files]
    elif name.quant is not None:
        wanted = [v for v in there if v.quant.lower() == name.quant.lower()]
    else:
        by_quant: dict[str, list[Variant]] = {}
        for v in there:
            by_quant.setdefault(v.quant, []).append(v)
        wanted = next((by_quant[q] for q in PREFERRED if q in by_quant), [])
        if not wanted and len(there) == 1:
            wanted = there
    if len(wanted) == 1:
        return wanted[0]
    if wanted:
        files = ", ".join(v.files[0] for v in wanted)
        raise ModelRefused(f"{name}: expected one model, found {files}; name the file")
    expected = "a model file" if not there else "one of these chosen" if _open(name) else "this one"
    raise ModelRefused(f"{name}: expected {expected}, found {listed(there) or 'no GGUF file'}")


def _open(name: HubName) -> bool:
    return name.file is None and name.quant is None


def listed(there: Iterable[Variant], sizes: Mapping[str, int] | None = None) -> str:
    """Quantisations as a line may name them, with their sizes in GB if they are known."""

    def size(v: Variant) -> str:
        total = sum(sizes.get(f, 0) for f in v.files) if sizes else 0
        return f" ({total / 1e9:.1f} GB)" if total else ""

    return ", ".join(v.quant + size(v) for v in there)
