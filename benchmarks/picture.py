"""Draws docs/decode.svg, README's picture of decoding over depth, from a GPU's evidence.

python benchmarks/picture.py benchmarks/results/cuda-h100.json docs/decode.svg
"""

import json
import re
import sys
from pathlib import Path

W, H, LEFT, RIGHT, TOP, BOTTOM = 640, 300, 60, 20, 40, 44
STYLE = """text{font:13px system-ui,sans-serif;fill:#5b6479}.grid{stroke:#dde1ea}
.a{stroke:#c2410c;fill:#c2410c}.b{stroke:#1d4ed8;fill:#1d4ed8}path{fill:none}path.a,path.b{fill:none;stroke-width:2.5}
text.a,text.b{stroke:none;font-weight:600}
@media(prefers-color-scheme:dark){text{fill:#9aa4ba}.grid{stroke:#333b4d}
.a{stroke:#fb923c;fill:#fb923c}.b{stroke:#7aa2ff;fill:#7aa2ff}path.a,path.b{fill:none}}"""


def curve(speeds: dict[str, float]) -> dict[int, float]:
    """Tokens/s of one sequence by depth; of several builds at a depth, the fastest."""
    found: dict[int, float] = {}
    for name, speed in speeds.items():
        if match := re.fullmatch(r"tg128@(\d+)(?: graph_opt)?", name):
            found[int(match[1])] = max(speed, found.get(int(match[1]), 0.0))
    return dict(sorted(found.items()))


def draw(curves: dict[str, dict[int, float]], title: str) -> str:
    deepest = max(d for c in curves.values() for d in c)
    step = 200
    top = step * -(-max(s for c in curves.values() for s in c.values()) // step)

    def x(depth: float) -> float:
        return LEFT + (W - LEFT - RIGHT) * depth / deepest

    def y(speed: float) -> float:
        return H - BOTTOM - (H - TOP - BOTTOM) * speed / top

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {W} {H}" width="{W}">',
        f"<title>{title}</title><style>{STYLE}</style>",
        f'<text x="{LEFT}" y="20">{title}</text>',
        f'<text x="{(LEFT + W) / 2}" y="{H - 8}" text-anchor="middle">depth (tokens before)</text>',
    ]
    for speed in range(0, int(top) + 1, step):
        out.append(f'<path class="grid" d="M{LEFT} {y(speed):.1f}H{W - RIGHT}"/>')
        out.append(
            f'<text x="{LEFT - 8}" y="{y(speed) + 4:.1f}" text-anchor="end">{speed:,}</text>'
        )
    for depth in next(iter(curves.values())):
        anchor = "end" if depth == deepest else "middle" if depth else "start"
        out.append(f'<text x="{x(depth):.1f}" y="{H - 26}" text-anchor="{anchor}">{depth:,}</text>')
    for style, (name, points) in zip("ab", curves.items(), strict=True):
        path = "L".join(f"{x(d):.1f} {y(s):.1f}" for d, s in points.items())
        out.append(f'<path class="{style}" d="M{path}"/>')
        for d, s in points.items():
            out.append(f'<circle class="{style}" cx="{x(d):.1f}" cy="{y(s):.1f}" r="4"/>')
        last, speed = list(points.items())[-1]
        at = f'x="{x(last):.1f}" y="{y(speed) - 12:.1f}" text-anchor="end"'
        out.append(f'<text class="{style}" {at}>{name}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def main() -> None:
    source, target = map(Path, sys.argv[1:3])
    data = json.loads(source.read_text("utf-8"))
    gpu = data["device"].partition(",")[0]
    curves = {
        "isobit": curve(data["isobit tokens/s"]),
        "llama.cpp": curve(data["llama.cpp tokens/s"]),
    }
    target.write_text(draw(curves, f"Decoding, tokens/s, 30B-A3B in Q4_K_M on one {gpu}"), "utf-8")


if __name__ == "__main__":
    main()
