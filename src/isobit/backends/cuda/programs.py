"""A model's programs, lowered and their memory planned before anything is loaded."""

from math import inf

from isobit.backends.base import Limits
from isobit.backends.cuda.device.gpu import Gpu
from isobit.backends.cuda.device.memory import STAGING_BYTES, Plan
from isobit.backends.cuda.graph import Program
from isobit.backends.cuda.lowering import PRESENT, Lowering, Variant
from isobit.backends.cuda.measure import Measuring
from isobit.backends.cuda.mixed import MixedPasses
from isobit.backends.cuda.passes import LOGIT_ROWS_AT_ONCE, Passes
from isobit.backends.cuda.resident import Resident
from isobit.backends.cuda.slots import MIXED, PASS, ROWS, STEP, STEPS, Inboxes
from isobit.backends.cuda.steps import ManySequences, OneSequence, SeveralRows, padded
from isobit.backends.pool import Room, fitted
from isobit.backends.slots import BATCH, TILES
from isobit.config import EngineConfig
from isobit.model.graph import Graph, Key
from isobit.model.weights import Weights
from isobit.numerics.ops import LOGIT_ROWS, TOKENS

_GRAPH_BYTES = 8 << 10
"""Of a captured graph, for each operation in it: about what an H200's driver takes."""
MOST_IN_STEP = 64
"""Sequences that take a decode step together."""


class Programs:
    """What runs a model: batches of any kind and, unless ``fused`` is off, captured steps."""

    def __init__(
        self,
        weights: Weights,
        engine: EngineConfig,
        limits: Limits,
        gpu: Gpu,
        fused: bool = True,
        variant: Variant = PRESENT,
    ) -> None:
        """Raises BackendUnavailable for a format or an operation without a kernel."""
        graph = weights.graph
        self.resident = Resident.of(graph, limits.positions)
        self._limits = limits
        together = min(engine.max_sequences, MOST_IN_STEP)
        # A repeated token would move its sequence's state on once more.
        sizes = [] if limits.states else sorted(variant.padded)
        if sizes:
            together = padded(min(engine.max_sequences, sizes[-1]), sizes)
            sizes = [size for size in sizes if size <= together]

        def program(kind: str, rows: int = 1) -> Program:
            at = graph, self.resident, gpu, engine.activation_planes, kind
            return Program(*at, fused=fused, rows=rows, variant=variant)

        self._logits = graph.logits.key
        self._programs: list[tuple[Program, int]] = []
        tokens = max(engine.chunk, together)
        made = program(PASS)
        self.passes = Passes(made, tokens, max(limits.pages, made.g.tiles))
        self._programs.append((made, tokens))
        self.one: OneSequence | None = None
        self.many: ManySequences | None = None
        steps = fused and not made.g.received  # rows that come with a batch: one by one
        if steps:
            made = program(STEP)
            self.one = OneSequence(made)
            self._programs.append((made, 1))
        if steps and together > 1:
            made = program(STEPS)
            self.many = ManySequences(made, together, sizes)
            self._programs.append((made, together))
        self.rows: dict[int, SeveralRows] = {}
        for rows in variant.rows if steps else ():
            made = program(ROWS, rows)
            self.rows[rows] = SeveralRows(made, rows)
            self._programs.append((made, rows))
        self.mixed: MixedPasses | None = None
        if steps and variant.mixed and not limits.states:
            made = program(MIXED)
            entries = max(limits.pages, made.g.tiles)
            self.mixed = MixedPasses(made, sorted(variant.mixed), entries)
            self._programs.append((made, self.mixed.sizes[-1]))
        rows = max(_rows(made.g, n)[LOGIT_ROWS] for made, n in self._programs)
        self.measuring = Measuring(gpu, rows, graph.logits.shape.width)
        self._given = _given_by_all(graph, [made for made, _ in self._programs])
        silent = graph.on_request
        self.fused_away = frozenset(
            key for key in graph.stages if key not in self._given and key[0] not in silent
        )
        graphs = {STEP: 2, STEPS: len(sizes) or together - 1, ROWS: 2}
        graphs[MIXED] = len(self.mixed.sizes) + len(self.mixed.heads) if self.mixed else 0
        self.plan = Plan(
            weights=self.resident.weights.nbytes,
            cache=self.resident.cache_bytes(limits.pages),
            states=self.resident.state_bytes(limits.states),
            rope=self.resident.rope_bytes(),
            graphs=_GRAPH_BYTES
            * sum(made.makes * graphs.get(made.g.kind, 0) for made, _ in self._programs),
            workspace=STAGING_BYTES
            + sum(made.g.nbytes(_rows(made.g, n)) for made, n in self._programs)
            + self.measuring.nbytes,
        )

    @property
    def exchanges(self) -> list[dict[str, Inboxes]]:
        """What each program gathers by, if the model is split."""
        return [made.g.exchange for made, _ in self._programs]

    @property
    def lasting(self) -> int:
        """The most bytes of the stages that can be read at the end of a step."""
        return max(made.g.lasting[1] for made, _ in self._programs)

    def asked(self, stages: frozenset[str] | None) -> frozenset[Key]:
        """What a trace of these stages is given, besides the logits: of all, what every way to run
        has; of those that are named, what passes have."""
        if stages is None:
            return self._given - {self._logits}
        passes = self._programs[0][0].marks
        return frozenset(key for key in passes if key[0] in stages) - {self._logits}

    def load(self, gpu: Gpu) -> None:
        """Take the memory, bring the weights there, capture what is captured."""
        self.resident.load(gpu, self._limits.pages, self._limits.states)
        for made, n in self._programs:
            made.g.allocate(_rows(made.g, n))
        self.measuring.allocate()
        for steps in (self.one, self.many, *self.rows.values(), self.mixed):
            if steps is not None:
                steps.start()


def planned(weights: Weights, engine: EngineConfig, gpu: Gpu) -> Plan:
    """What a model takes of a device's memory. Raises BackendUnavailable as :class:`Programs`."""
    engine, _ = fitted(weights, engine, lambda _: Room(inf, 1))  # whatever the device has
    return Programs(weights, engine, Limits.of(weights, engine, keeps=True), gpu).plan


def room(
    weights: Weights, engine: EngineConfig, gpu: Gpu, fused: bool, variant: Variant = PRESENT
) -> Room:
    """What a device's free memory leaves to the KV cache."""
    limits = Limits.of(weights, engine, keeps=True)
    plan = Programs(weights, engine, limits, gpu, fused=fused, variant=variant).plan
    return Room(plan.left(gpu.memory()[0]), -(-plan.cache // limits.pages))


def _rows(g: Lowering, tokens: int) -> dict[str, int]:
    """Rows of each kind that a program's slots have."""
    return {
        TOKENS: tokens,
        LOGIT_ROWS: tokens if g.every else min(tokens, LOGIT_ROWS_AT_ONCE),
        TILES: tokens * g.tiles,
        BATCH: 1,
    }


def _given_by_all(graph: Graph, programs: list[Program]) -> frozenset[Key]:
    """Stages that can be read whichever program runs."""
    return frozenset(graph.stages).intersection(*(made.marks for made in programs))
