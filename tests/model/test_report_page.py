"""The page of a comparison in a browser: every picture is drawn, on a telephone and on a desk."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import isobit
from isobit.runtime.model import Model
from isobit.verify import blame, report
from isobit.verify.forward import flow
from isobit.verify.trace import ModelRun
from isobit.verify.verify import verify
from tests.helpers.expected import not_run

IDS = [605, 290, 948, 268, 624, 475, 17, 30]


@pytest.fixture(scope="module")
def sides() -> Iterator[tuple[Model, Model]]:
    coarse = isobit.load("sample", "cpu", activation_bits=8, context=64)
    with coarse, isobit.load("sample", "cpu", context=64) as fine:
        yield coarse, fine


def test_what_a_layer_reads_from_what(sides: tuple[Model, Model]) -> None:
    found = flow(sides[0].graph)
    assert sorted(found) == list(range(8))
    assert all(pairs == found[0] for pairs in found.values())
    pairs = set(found[0])
    assert {("input", "attn_norm"), ("attn_norm", "qkv_matmul")} <= pairs
    assert {("attn_out", "post_attn_residual"), ("input", "post_attn_residual")} <= pairs
    assert {("k_post_rope", "attention"), ("moe_router_indices", "moe_expert_gate")} <= pairs
    assert not any(a == "final_norm" or b in ("input", "embedding") for a, b in pairs)


def test_margins_are_of_every_token_of_every_layer(sides: tuple[Model, Model]) -> None:
    diff = verify(sides[0], ModelRun(sides[1]), IDS, histograms=True)
    places = [(layer, position) for layer, position, *_ in diff.margins]
    assert places == [(layer, i) for layer in range(8) for i in range(len(IDS))]
    assert sum(changed for *_, changed in diff.margins) == diff.router_changed
    by_place = {(c.layer, c.position): c for c in diff.router}
    for layer, position, margin, drift, changed in diff.margins:
        assert changed is ((layer, position) in by_place)
        if changed:
            c = by_place[layer, position]
            assert (margin, drift) == (min(c.margin_a or 0, c.margin_b or 0), c.drift)
    assert not verify(sides[0], ModelRun(sides[1]), IDS).margins


@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_draws_every_picture(
    width: int, sides: tuple[Model, Model], tmp_path: Path
) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        not_run("chromium", "no chromium to draw a page")
    diff = verify(sides[0], ModelRun(sides[1]), IDS, histograms=True)
    page = tmp_path / "page.html"
    page.write_text(report.html(diff, blame.texts(sides[0].detokenize)), "utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    titles = re.findall(r"<h2>(.*?)</h2>", done.stdout)
    pictures = ["One layer", "Layer by layer", "Own error against the whole difference"]
    pictures += ["Router margins", "The next token, along the text", "Where each token parts"]
    pictures += ["Experts that changed"] if diff.router else []
    assert set(pictures) <= set(titles), (titles, done.stderr[-2000:])
    assert "● qkv_matmul" in done.stdout
    assert titles[-1] == "Worst values"  # the last part of the page: no script broke off
    assert "moe_expert_swiglu</td>" in done.stdout.partition("Worst values")[2]
