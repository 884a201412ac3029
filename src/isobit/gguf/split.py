"""A model in several files: which files those are, and whether they belong together.

Owns the ``split.*`` metadata. Files above some 50 GB come as ``NAME-00001-of-0000N.gguf``: each is
a GGUF file of its own with some of the tensors, and the first alone has the model's metadata.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from isobit.gguf.header import Header, refusal, show

_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
_OF_ITS_FILE = ("split.", "general.alignment")  # what each part says for itself


def part_paths(path: Path, header: Header) -> list[Path]:
    """The files of the model that ``path`` is a part of, in order; ``[path]`` if it is whole.

    Raises ModelRefused if the file's name and its metadata do not agree.
    """
    count = _number(path, header, "split.count", 0)
    if count < 2:
        return [path]
    number = _number(path, header, "split.no") + 1
    if not 1 <= number <= count:
        raise refusal(path, "split.no", f"0 to {count - 1}, split.count being {count}", number - 1)
    name = _NAME.fullmatch(path.name)
    if name is None or (int(name[2]), int(name[3])) != (number, count):
        expected = f"one that ends in -{number:05}-of-{count:05}.gguf, as its metadata say"
        raise refusal(path, "file name", expected, show(path.name))
    return [path.with_name(f"{name[1]}-{n:05}-of-{count:05}.gguf") for n in range(1, count + 1)]


def joined(parts: Sequence[tuple[Path, Header]]) -> Header:
    """One header for all parts, in their order; each tensor knows the part it lies in.

    Raises ModelRefused if the parts are not all of one model.
    """
    (first_path, first), *others = parts
    if not others:
        return first
    total = _number(first_path, first, "split.tensors.count")
    for number, (path, header) in enumerate(parts):
        for key, expected in (
            ("split.count", len(parts)),
            ("split.no", number),
            ("split.tensors.count", total),
        ):
            if (got := _number(path, header, key)) != expected:
                raise refusal(path, key, f"{expected}, from its name and {first_path.name}", got)
        for key, value in header.metadata.items():
            if not key.startswith(_OF_ITS_FILE) and first.metadata.get(key) != value:
                expected_value = f"what {first_path.name} says or nothing"
                raise refusal(path, f"metadata {show(key)}", expected_value, show(value))

    tensors, refused = dict(first.tensors), dict(first.refused)
    for number, (path, header) in enumerate(parts):
        for name in header.tensors.keys() | header.refused.keys():
            if number and (name in tensors or name in refused):
                raise refusal(path, f"tensor {show(name)}", "it in one part alone", "it in two")
        for name, info in header.tensors.items():
            tensors[name] = dataclasses.replace(info, part=number)
        refused |= header.refused
    if (found := len(tensors) + len(refused)) != total:
        raise refusal(first_path, "split.tensors.count", f"the {found} tensors of all parts", total)
    return Header(first.version, first.metadata, tensors, refused)


def _number(path: Path, header: Header, key: str, default: int | None = None) -> int:
    value = header.metadata.get(key, default)
    if type(value) is not int or value < 0:
        got = "none" if value is None else show(value)
        raise refusal(path, f"metadata {show(key)}", "a number, as in every part", got)
    return value
