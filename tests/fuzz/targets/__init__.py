"""What is given hostile inputs. A module has ``one(rng) -> str``, what came of one input."""

TARGETS = (
    "text",
    "messages",
    "templates",
    "headers",
    "models",
    "threads",
    "traces",
    "contracts",
    "commands",
)
