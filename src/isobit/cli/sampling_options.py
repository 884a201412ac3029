"""How tokens are chosen: options, and what a model's file recommends."""

import argparse
from collections.abc import Mapping

from isobit.cli import argtypes, say
from isobit.errors import UsageError
from isobit.runtime.generation import Settings, checked_sampling
from isobit.runtime.sampler import Sampling

_SAMPLING = {
    "temperature": ("temp", "0 takes the most likely token"),
    "top_k": ("top_k", "keep the K most likely tokens; 0 keeps all"),
    "top_p": ("top_p", "keep the fewest tokens whose probabilities reach this sum"),
    "min_p": ("min_p", "keep tokens at least this fraction as likely as the most likely"),
    "repeat_penalty": ("penalty_repeat", "make tokens that occurred less likely; 1 does not"),
}
"""Fields of Sampling: the key of a model file (``general.sampling.…``) and what it does."""


def add_sampling(parser: argparse.ArgumentParser, *, recommended: bool = False) -> None:
    """How tokens are chosen; ``recommended`` leaves room for what the model's file recommends."""
    group = parser.add_argument_group("sampling")
    for name, (_, text) in _SAMPLING.items():
        default = getattr(Sampling, name)
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=argtypes.at_least(0) if name == "top_k" else argtypes.decimal,
            default=None if recommended else default,
            metavar="X",
            help=f"{text} (default: {'the file’s, or ' if recommended else ''}{default})",
        )
    group.add_argument(
        "--seed",
        type=argtypes.whole,
        metavar="X",
        help="random seed, any integer of 64 bits, negative ones modulo 2^64; the same seed gives "
        "the same text (default: a new one each time)",
    )
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        type=_stop,
        metavar="TEXT",
        help="stop when this text appears (not printed); repeatable",
    )


def settings(args: argparse.Namespace) -> Settings:
    """The arguments of ``add_sampling``, and ``--max-tokens``, as ``Model.stream`` takes them.

    Ask before a model is opened: what is out of range is refused here, and loading takes time.
    """
    given = {name: value for name in _SAMPLING if (value := getattr(args, name)) is not None}
    Sampling(**given, seed=args.seed)
    chosen: Settings = {"max_tokens": args.max_tokens, "seed": args.seed, "stop": args.stop}
    chosen.update(given)  # type: ignore[typeddict-item]
    return chosen


def recommended(metadata: Mapping[str, object], chosen: Settings) -> dict[str, float]:
    """The sampling that a model's file recommends, where ``chosen`` says nothing.

    A value that is out of range is left out, and said: it is advice, and no reason to refuse the
    model.
    """
    found: dict[str, float] = {}
    for name, (key, _) in _SAMPLING.items():
        full = f"general.sampling.{key}"
        if name in chosen or full not in metadata:
            continue
        try:
            checked_sampling(None, **{name: metadata[full]})  # type: ignore[arg-type]
        except UsageError as error:
            say(f"the file's {full} is not followed: {error}")
        else:
            found[name] = metadata[full]  # type: ignore[assignment]
    return found


def words(sampling: Mapping[str, float]) -> str:
    """Sampling settings for people: "temperature 0.7, top-p 0.8, as the file recommends"."""
    shown = ", ".join(f"{name.replace('_', '-')} {v:g}" for name, v in sampling.items())
    return f"{shown}, as the file recommends" if shown else ""


def _stop(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("expected a text, got an empty one")
    return text
