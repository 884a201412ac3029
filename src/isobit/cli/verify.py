"""``isobit verify``: compare a backend with another, the oracle, or transformers."""

import argparse
import json
from contextlib import ExitStack, suppress

import numpy as np

from isobit.backend_names import BACKENDS
from isobit.cli import options, say, tools
from isobit.cli.output import bar, print_table
from isobit.errors import GateFailed, NothingCompared, UsageError, did_you_mean
from isobit.runtime.model import Model
from isobit.verify import blame, plugin
from isobit.verify.diff import Diff
from isobit.verify.faults import FAULTS, Planted, plant, with_backend
from isobit.verify.trace import ModelRun, Recordable
from isobit.verify.trace_file import parse_layers, where
from isobit.verify.verify import verify

_DROP = ("mean KL", "experts", "first", "tokens", "least cosine", "next token")
"""Columns that a narrow terminal does without, the first of them first."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    options.add_model(parser)
    tools.add_prompts(parser)
    parser.add_argument(
        "--against",
        default="reference",
        metavar="NAME",
        help="a backend, to compare bits; or oracle (float64) or hf (transformers), which say how "
        "accurate it is (default: %(default)s)",
    )
    options.add_activation_bits(
        parser, "against-", None, "its bits of an activation, 8 or 16 (default: the same)"
    )
    parser.add_argument(
        "--plant",
        metavar="FAULT[@LAYER]",
        help="compare the reference with a fault planted in a layer (default: the middle one) in "
        f"place of --backend, to see that it is found: {', '.join(FAULTS)}",
    )
    parser.add_argument(
        "--op",
        action="append",
        default=[],
        metavar="STAGE=MODULE:FUNCTION",
        help="verify a function of yours: the reference with it in the place of a stage's "
        "operation; repeatable (docs/your-kernel.md)",
    )
    options.add_engine(parser, backend="cpu")
    tools.add_report(parser)
    tools.add_cosine(parser)


def main(args: argparse.Namespace) -> None:
    """Run the command."""
    if args.against not in (*BACKENDS, "oracle", "hf"):
        known = f"oracle, hf or a backend ({', '.join(BACKENDS)})"
        near = did_you_mean(args.against, ("oracle", "hf", *BACKENDS))
        raise UsageError(f"--against: expected {known}, got {args.against!r}{near}")
    prompts = tools.read_prompts(args)
    if len(prompts) > 1 and args.html:
        raise UsageError(f"--html: expected one prompt to show, got {len(prompts)}")
    n = max(map(len, prompts))
    functions = _functions(args)
    if functions:
        args.backend = "reference"
    with ExitStack() as stack:
        name = args.backend if args.plant is None else "reference"
        alone = args.plant is not None or bool(functions)
        sizes = options.sizes(args, spread=not alone)
        x = tools.open_exactly(args.model, name, args.activation_bits, args.threads, n, **sizes)
        stack.enter_context(x)
        planted = None
        if args.plant is not None:
            planted = _planted(args.plant, x)
            x = stack.enter_context(with_backend(x, planted.make))
        if functions:
            x = with_backend(x, lambda w, e: plugin.WithFunctions(w, e, functions))
            stack.enter_context(x)
        layers = None if args.layers == "all" else parse_layers(args.layers, x.config.n_layers)
        y = _against(args, x, n)
        if isinstance(y, ModelRun):
            stack.enter_context(y.model)
            if not alone:
                _require_another(x, y.model)
            _require_shown(planted, y)
        found, stopped = _compared(x, y, prompts, layers, pictures=bool(args.html))
        text = blame.texts(x.detokenize)
        if stopped is not None:
            with suppress(GateFailed):
                if found:
                    _show_all(found, args, text)
            raise KeyboardInterrupt(stopped)
        if planted is not None:
            _say_whether_found(planted, found)
        if len(found) == 1:
            tools.show(found[0], args, text)
        else:
            _show_all(found, args, text)


def _functions(args: argparse.Namespace) -> dict[str, plugin.Function]:
    """Those that --op puts to the test. Raises UsageError where one of them, or what --plant has,
    would not be."""
    found = dict(plugin.parse(text) for text in args.op)
    if len(found) < len(args.op):
        raise UsageError("--op: expected each stage once, got one twice")
    if args.plant is not None and args.against not in BACKENDS:
        raise UsageError(
            f"--plant: expected a backend to compare with, whose bits show where a fault is; got "
            f"--against {args.against}"
        )
    if found and args.plant is not None:
        raise UsageError("--op: expected no --plant beside it: one of them at a time is looked for")
    return found


def _require_another(x: Model, y: Model) -> None:
    """Raises NothingCompared for one backend in one arithmetic on both sides, unless the model is
    spread on one of them."""
    name, bits, engine = x.backend.name, x.engine.activation_bits, x.engine
    spread = engine.parts > 1 or engine.stages
    if not spread and (name, bits) == (y.backend.name, y.engine.activation_bits):
        raise NothingCompared(
            f"expected --against another backend, or other bits of activations, got {name} with "
            f"{bits} bits twice: it would agree with itself on anything"
        )


def _compared(
    x: Model,
    y: Recordable,
    prompts: list[list[int]],
    layers: range | None,
    *,
    pictures: bool,
) -> tuple[list[Diff], str | None]:
    """The comparison after each prompt; after Ctrl-C those that there are, and how far it came."""
    found: list[Diff] = []
    n_layers = x.config.n_layers
    with bar("layers") as step:

        def progress(stage: str, layer: int | None) -> None:
            if layer is not None and stage == "post_ffn_residual":
                step(len(found) * n_layers + layer + 1, n_layers * len(prompts))

        try:
            for tokens in prompts:
                found.append(verify(x, y, tokens, layers, progress, histograms=pictures))
        except KeyboardInterrupt:
            return found, f"after {len(found)} of {len(prompts)} prompts" if found else ""
    return found, None


def _require_shown(planted: Planted | None, y: ModelRun) -> None:
    """Raises UsageError for a fault in a stage that this side has, but does not show."""
    hidden = y.model.graph.stages.keys() - y.graph.stages.keys()
    if planted is not None and planted.place in hidden:
        raise UsageError(
            f"--plant: expected a fault in a stage that --against shows, got {planted.name}, which "
            f"is in {where(*planted.place)}"
        )


def _planted(text: str, model: Model) -> Planted:
    """The fault that --plant names. Raises UsageError for one that there is not."""
    name, _, at = text.partition("@")
    n = model.config.n_layers
    if name not in FAULTS:
        near = did_you_mean(name, FAULTS) or f"; there are {', '.join(FAULTS)}"
        raise UsageError(f"--plant: no such fault: {name!r}{near}")
    if at and not (at.isdecimal() and len(at) < 7 and int(at) < n):
        raise UsageError(f"--plant: expected a layer from 0 to {n - 1} after the @, got {at!r}")
    return plant(name, int(at) if at else n // 2, np.random.default_rng(0))


def _say_whether_found(planted: Planted, found: list[Diff]) -> None:
    """What the comparison made of a planted fault. Raises GateFailed where it is not the first that
    differs, in every prompt."""
    at = where(*planted.place)
    say(f"planted {planted.name}: it first shows in {at}")
    for i, d in enumerate(found):
        got = "nothing" if d.first is None else d.first.where
        if got != at:
            raise GateFailed(f"prompt {i}: expected {planted.name} found at {at}, got {got}")
    say(f"found there{f', after each of {len(found)} prompts' if len(found) > 1 else ''}")


def _show_all(found: list[Diff], args: argparse.Namespace, text: blame.Text) -> None:
    """One row a prompt, and below it what differs where; raises GateFailed as ``tools.show``."""
    gate = None if args.min_cosine is None else blame.gate(found, args.min_cosine)
    if args.json:
        out: dict[str, object] = {"prompts": [d.to_json() for d in found]}
        print(json.dumps(out | ({} if gate is None else {"gate": tools.gate_json(gate)})))
    else:
        header = ["prompt", "tokens", "differing", "first", "faulty", "least cosine", "experts"]
        header += ["next token", "mean KL"]
        print_table(
            header, [_row(i, d, text) for i, d in enumerate(found)], args.format, drop=_DROP
        )
        for i, d in enumerate(found):
            for line in [*blame.located(d, text), *d.notes]:
                print(f"prompt {i}: {line}")
        if gate is not None:
            print(f"gate: {gate}")
    if gate is not None:
        tools.require_gate(gate)
    if gate is not None or found[0].accuracy:
        tools.require_finite(found)
    wrong = [i for i, d in enumerate(found) if not d.accuracy and not d.identical]
    if wrong and gate is None:
        at = ", ".join(map(str, wrong[:8])) + (", …" if len(wrong) > 8 else "")
        raise GateFailed(f"the runs differ for {len(wrong)} of {len(found)} prompts: {at}")


def _row(number: int, d: Diff, text: blame.Text) -> list[str]:
    cosines = list(blame.gate([d], -1.0).cosines.items()) if _has_output(d) else []
    worst = min(cosines, key=lambda pair: pair[1], default=None)
    last = [c for c in d.argmax if c.position == len(d.a.tokens) - 1]
    return [
        f"{number}: {' '.join(map(str, d.a.tokens[:4]))}{' …' if len(d.a.tokens) > 4 else ''}",
        str(len(d.a.tokens)),
        f"{sum(not s.distance.identical for s in d.stages)} of {len(d.stages)}",
        d.first.where if d.first is not None and not d.accuracy else "-",
        d.faulty[0].where if d.faulty else "-",
        f"{worst[1]:.6g} (layer {worst[0]})" if worst else "-",
        f"{d.router_changed} of {d.router_rows}",
        f"{text(last[0].a)}, not {text(last[0].b)}" if last else "same",
        blame.number(d.mean_kl),
    ]


def _has_output(d: Diff) -> bool:
    return any(s.stage == blame.OUTPUT for s in d.stages)


def _against(args: argparse.Namespace, x: Model, context: int) -> Recordable:
    bits = args.against_activation_bits
    other = tools.foreign_run(args.against, x.file)
    if other is not None:
        if bits is not None:
            raise UsageError(
                f"--against-activation-bits: expected a backend's, {args.against} has none"
            )
        return other
    bits = args.activation_bits if bits is None else bits
    return ModelRun(
        tools.open_exactly(
            args.model,
            args.against,
            bits,
            args.threads,
            context,
            **options.sizes(args, spread=False),
        )
    )
