"""Takes the measures of the shipped contracts that this machine can take, and writes the evidence.

usage: python -m tests.model.record_contracts [BACKEND ...]     (default: cpu wgpu)

Two models are measured: the sample, and for what asks for a vocabulary of 151,936 tokens one layer
of the 30B's width with random weights (0.8 GB, written for the run).
Afterwards: isobit contract status contracts/*.yaml
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from isobit.cli import main
from isobit.contracts.check import select
from isobit.contracts.document import read
from isobit.contracts.validate import validate
from isobit.errors import NotRun
from tests.helpers.geometries import QWEN3_30B_A3B
from tests.helpers.synth import Geometry, write_model

ROOT = Path(__file__).parents[2]
WIDE = Geometry.of(QWEN3_30B_A3B, layers=1, context=4096)


def run() -> int:
    worst = 0
    with TemporaryDirectory() as folder:
        wide = Path(folder) / "wide-1-layer.gguf"
        write_model(wide, WIDE, vocabulary=ROOT / "tests/data/qwen2-vocab.gguf")
        for path in sorted((ROOT / "contracts").glob("*.yaml")):
            contract = validate(read(path))
            assert contract is not None
            large = [
                t.id
                for t in select(contract)
                if (needs := t.measure.model) and needs.vocabulary and not needs.layers
            ]
            evidence = ["--evidence", str(ROOT / "contracts/evidence" / path.stem)]
            for backend in sys.argv[1:] or ["cpu", "wgpu"]:
                if not any(backend in t.measure.backends for t in select(contract)):
                    continue
                for model, some in (("sample", "--without"), (str(wide), "--tests")):
                    names = [some, ",".join(large), "--backends", backend]
                    code = main(
                        ["contract", "check", str(path), "--model", model, *names, *evidence]
                    )
                    worst = max(worst, 0 if code == NotRun.exit_code else code)
    return worst


if __name__ == "__main__":
    sys.exit(run())
