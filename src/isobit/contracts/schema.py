"""The contract, typed once: every key, what it means, and the JSON Schema made of that.

The layout is that of public *provable contracts*; ``measure``, ``discharges`` and ``id`` of an
obligation are isobit's additions, which make a contract executable.
"""

from datetime import date
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from isobit.contracts.kinds import ContractPart, Measure

STATUSES = (
    "DRAFT",
    "PROPOSED",
    "ACTIVE",
    "ACTIVE_ALGORITHM_LEVEL",
    "ACTIVE_ALGORITHM_LEVEL_WITH_DOCUMENTED_DIVERGENCE",
    "ACTIVE_RUNTIME",
    "SUPERSEDED",
    "DEPRECATED",
)
"""Statuses of a contract. They are what its authors say; ``isobit contract status`` asks the
evidence."""
SHIPPED = ("SHIPPED", "DISCHARGED", "DONE", "COMPLETE")
"""Statuses of a stage that claim it is there."""
STAGE_STATUSES = (
    *SHIPPED,
    "PENDING",
    "PLANNED",
    "IN_PROGRESS",
    "PARTIAL",
    "PARTIALLY_DISCHARGED",
    "BLOCKED",
    "PARKED",
)
NOT_BENIGN = "KNOWN_DIVERGENCE_NOT_BENIGN"
BENIGN = "KNOWN_DIVERGENCE_BENIGN"
Divergence = Literal[
    "KNOWN_DIVERGENCE_NOT_BENIGN", "KNOWN_DIVERGENCE_BENIGN", "KNOWN_LIMITATION_BENIGN"
]
"""Classes of a divergence: one that flips some prompt's next token; one that flips none of those
tried; and the latter's older name."""

VERSION = r"^[0-9]{1,6}\.[0-9]{1,6}\.[0-9]{1,6}$"
Version = Annotated[str, Field(pattern=VERSION)]


def _day(value: str) -> str:
    try:
        date.fromisoformat(value)
    except ValueError:
        raise PydanticCustomError("date", "no such day") from None
    return value


Date = Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$"), AfterValidator(_day)]
Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[
    list[Text],
    BeforeValidator(
        lambda value: [value] if isinstance(value, str) else value,
        json_schema_input_type=list[Text] | Text,
    ),
]
"""A list of texts; one text alone stands for a list of it."""


class Amendment(ContractPart):
    """One entry of the contract's history."""

    version: Version = Field(description="The contract's version from this entry on.")
    date: Date = Field(description="The day, as YYYY-MM-DD.")
    kind: Text = Field("amendment", description='"created" for the first entry, "amendment".')
    title: Text = Field(description="What changed, in one line.")
    description: str | None = Field(None, description="What was found, and what follows.")
    divergence: Divergence | None = Field(
        None, description="The class of a divergence that this entry records."
    )


class Metadata(ContractPart):
    """Who promises what since when."""

    version: Version = Field(description="Semantic version, MAJOR.MINOR.PATCH, in quotes.")
    kind: str | None = Field(None, description="What is specified: kernel, registry, …")
    created: Date | None = Field(None, description="The day of the first version.")
    author: str | None = Field(None, description="Who answers for it.")
    description: Text = Field(description="What the contract is about.")
    references: list[Text] = Field(
        default_factory=list, description="Papers, documents and files it rests on."
    )
    depends_on: list[Text] = Field(
        default_factory=list, description="Contracts it builds on, by file stem."
    )
    enforcement_level: str | None = Field(
        None, description="What a violation means: advisory, blocking, …"
    )
    amendment_history: list[Amendment] = Field(
        default_factory=list, description="Every version, all newest first or all oldest first."
    )
    lessons_learned: Any = Field(None, description="Free notes.")
    updated: Date | None = Field(None, description="The day of the last change.")
    status: str | None = Field(
        None, description="The same as the contract's status, for files that have it here."
    )


class Equation(ContractPart):
    """One thing that is computed."""

    id: str | None = Field(None, description="Its name, where equations are a list.")
    formula: Text = Field(
        validation_alias=AliasChoices("formula", "formal"),
        description="The formula, in words or symbols; some contracts call it ``formal``.",
    )
    domain: str | None = Field(None, description="What goes in: symbols, shapes, ranges.")
    codomain: str | None = Field(None, description="What comes out.")
    invariants: list[Text] = Field(default_factory=list, description="What always holds.")
    preconditions: list[Text] = Field(default_factory=list, description="What is assumed.")
    postconditions: list[Text] = Field(default_factory=list, description="What is promised.")
    float_tolerance: float | str | dict[str, Any] | None = Field(
        None, description="How far floats may be off."
    )
    rationale: str | None = Field(None, description="Why it is so.")
    description: str | None = Field(None, description="More words.")
    lean_theorem: str | None = Field(None, description="A Lean theorem that proves it.")


def _by_id(value: Any) -> Any:
    """A list of equations, each with its id, by that."""
    named = isinstance(value, list) and all(
        isinstance(e, dict) and isinstance(e.get("id"), str) for e in value
    )
    return {e["id"]: e for e in value} if named else value


Equations = Annotated[
    dict[str, Equation],
    BeforeValidator(_by_id, json_schema_input_type=dict[str, Equation] | list[Equation]),
]


class ProofObligation(ContractPart):
    """One promise."""

    id: str | None = Field(
        None,
        description="Its name, such as AC_QW3_MOE_001. Left out, a name in brackets at the end of "
        "``property`` is taken.",
    )
    type: str | None = Field(
        None,
        description="invariant, equivalence, bound, monotonicity, idempotency, conservation, …",
    )
    property: Text = Field(
        validation_alias=AliasChoices("property", "statement"),
        description="The promise in words; some contracts call it ``statement``.",
    )
    discharged_by: Texts = Field(
        default_factory=list, description="Ids of the tests and harnesses that could refute it."
    )
    formal: str | None = Field(None, description="The promise in symbols.")
    tolerance: float | str | None = Field(None, description="What may be missing from it.")
    applies_to: str | None = Field(None, description='What it speaks of: "all", "simd", …')
    note: str | None = Field(None, description="What else one should know.")
    notes: str | None = Field(None, description="The same as note.")
    divergence: Divergence | None = Field(
        None, description="Set while the promise is known to be broken, and how badly."
    )
    lean: Any = Field(None, description="A Lean theorem that proves it.")


class Stage(ContractPart):
    """A step of the implementation."""

    id: Text = Field(description="Its name.")
    status: Text = Field(description="SHIPPED, PENDING, IN_PROGRESS, BLOCKED, …")
    description: Text = Field(description="What the step is.")
    evidence: Texts = Field(
        default_factory=list, description="Files and tests that show it; needed once SHIPPED."
    )
    expected_acceptance: Texts = Field(
        default_factory=list, description="Ids of the obligations it is to discharge."
    )
    blockers: Texts = Field(default_factory=list, description="What it waits for.")


TEST_KEYS = ("test", "falsification_test", "test_harness", "implementation")


class FalsificationTest(ContractPart):
    """A prediction that can turn out wrong."""

    id: Text = Field(description="Its name, such as FALSIFY-QW3-MOE-PARITY-001.")
    rule: str = Field(
        "",
        validation_alias=AliasChoices("rule", "name"),
        description="What it is about, in one line; some contracts call it ``name``.",
    )
    prediction: Text = Field(description="What will be seen if the promise holds.")
    test: str | None = Field(
        None,
        validation_alias=AliasChoices(*TEST_KEYS),
        description="How to see it: a test or a command; some contracts call it "
        "``falsification_test``, ``test_harness`` or ``implementation``.",
    )
    if_fails: str | None = Field(None, description="What a failure would mean, where to look.")
    discharges: list[Text] = Field(
        default_factory=list,
        description="Ids of the obligations it could refute. Left out, ids named in the other "
        "texts are taken.",
    )
    measure: Measure | None = Field(
        None, description="What isobit contract check is to measure; without it nothing is run."
    )


class KaniHarness(ContractPart):
    """A bounded model-checking harness (Rust); carried along, not run here."""

    id: Text = Field(description="Its name.")
    obligation: Text = Field(description="The obligation it serves.")
    property: str | None = Field(None, description="What it proves.")
    description: str | None = Field(None, description="More words.")
    bound: int | None = Field(None, description="Loop unwinding bound.")
    strategy: str | None = Field(None, description="exhaustive, bounded_int, stub_float, …")
    solver: str | None = Field(None, description="The SAT solver.")
    harness: str | None = Field(None, description="The function's name.")


class QaGate(ContractPart):
    """What must pass before the contract counts as kept."""

    id: str | None = Field(None, description="Its name.")
    name: str | None = Field(None, description="Its title.")
    description: str | None = Field(None, description="More words.")
    checks: list[Text] = Field(default_factory=list, description="Names of the checks.")
    pass_criteria: str | None = Field(None, description="When it counts as passed.")
    falsification: str | None = Field(None, description="A change that must make it fail.")
    min_coverage: float | None = Field(None, description="Least share of lines that tests run.")
    max_complexity: float | None = Field(None, description="Most branches of a function.")
    required_tests: Any = Field(None, description="Tests that have to be there, freely.")


class Contract(ContractPart):
    """A contract: what a computation must satisfy and what would show that it does not."""

    metadata: Metadata = Field(description="Version, history and what it rests on.")
    kind: str | None = Field(None, description="Such as KernelContract.")
    name: str | None = Field(None, description="The contract's name, without its version.")
    version: Version | None = Field(None, description="The same as metadata.version.")
    status: str | None = Field(None, description=f"What its authors say: {', '.join(STATUSES)}.")
    scope: str | None = Field(None, description="The files it speaks of.")
    description: str | None = Field(None, description="What is computed, at length.")
    equations: Equations = Field(
        default_factory=dict,
        description="What is computed, by name, or a list with an ``id`` each.",
    )
    proof_obligations: list[ProofObligation] = Field(
        default_factory=list, description="The promises."
    )
    implementation_stages: list[Stage] = Field(
        default_factory=list, description="How far the implementation has come."
    )
    falsification_tests: list[FalsificationTest] = Field(
        default_factory=list, description="What would refute the promises."
    )
    kani_harnesses: list[KaniHarness] = Field(
        default_factory=list, description="Bounded model-checking harnesses."
    )
    qa_gate: QaGate | None = Field(None, description="When all of it counts as kept.")
    kernel_structure: Any = Field(None, description="Phases of a kernel, freely.")
    simd_dispatch: Any = Field(None, description="Functions by instruction set, freely.")
    enforcement: Any = Field(None, description="Rules that are checked elsewhere, freely.")
    verification_summary: Any = Field(None, description="Counts of proofs, freely.")

    @property
    def declared(self) -> str | None:
        """The status that its authors give it, wherever it stands."""
        return self.status if self.status is not None else self.metadata.status


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a contract, for editors; it allows no keys beyond the schema's."""
    schema: dict[str, Any] = Contract.model_json_schema()
    for part in (schema, *schema["$defs"].values()):
        if part.get("type") == "object":
            part["additionalProperties"] = False
    for model in (Equation, ProofObligation, FalsificationTest):
        part = schema["$defs"][model.__name__]
        for field in model.model_fields.values():
            if not isinstance(field.validation_alias, AliasChoices):
                continue
            first, *others = map(str, field.validation_alias.choices)
            part["properties"] |= dict.fromkeys(others, part["properties"][first])
            if first in part["required"]:
                part["required"].remove(first)
                part["oneOf"] = [{"required": [name]} for name in (first, *others)]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema
