"""Draws docs/images/architecture.svg from the imports of jaxrl/ and models/.

    python docs/architecture.py

Boxes and their places are chosen here; the arrows are what the code imports, less those that follow from others.
An import that goes up the picture is dashed.
"""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
WIDTH, HEIGHT, GAP, ROW = 1080, 62, 28, 116
# name: (what it does, row, first column, columns), of four columns
BOXES = {
    "commands": ("train · sft · evaluate · generate · export · study · report · preflight", 0, 0, 4),
    "evaluation": ("data sets, accuracy with intervals, length control", 1, 0, 2),
    "step": ("build · collect: prompts to rollouts · batch: rollouts to rows", 1, 2, 2),
    "reporting": ("figures, page", 2, 0, 1),
    "rollout": ("sampler, budget forcing", 2, 1, 1),
    "learner": ("packing, log-probs, update", 2, 2, 1),
    "tasks": ("problems, grading, rewards", 2, 3, 1),
    "runtime": ("config, mesh, checkpoints, metrics, signals, hosts", 3, 0, 3),
    "models": ("decoder, Hugging Face weights, tokenizers", 4, 0, 2),
    "algorithms": ("losses, advantages, selection, length rewards: pure functions", 4, 2, 2),
}
GROUPS = {name: "commands" for name in "train sft evaluate generate export study report preflight".split()}
GROUPS |= dict.fromkeys("build collect shaping batch memory rollout_metrics".split(), "step")
GROUPS |= dict.fromkeys("errors types rollouts".split(), "")  # records that all speak


def box_of(module: str) -> str:
    """The box that a dotted module name belongs to; "" if none."""
    head, _, rest = module.partition(".")
    part = "models" if head == "models" else rest.partition(".")[0] if head == "jaxrl" else ""
    return GROUPS.get(part, part if part in BOXES else "")


def imports() -> set[tuple[str, str]]:
    """(box, box that it imports from), of all modules."""
    found = set()
    for file in [*ROOT.glob("jaxrl/**/*.py"), *ROOT.glob("models/*.py")]:
        here = box_of(".".join(file.relative_to(ROOT).with_suffix("").parts))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found |= {(here, box_of(name)) for name in names}
    return {(a, b) for a, b in found if a and b and a != b}


def arrows(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The edges without those that follow from others that go down the picture."""
    down = {(a, b) for a, b in edges if BOXES[a][1] <= BOXES[b][1]}
    reach = set(down)
    while more := {(a, d) for a, b in reach for c, d in down if b == c} - reach:
        reach |= more
    longer = {(a, d) for a, b in down for c, d in reach if b == c}
    return down - longer | edges - down


def place(name: str) -> tuple[float, float, float]:
    """(left, top, width) of a box in pixels."""
    _, row, column, columns = BOXES[name]
    unit = (WIDTH + GAP) / 4
    return column * unit, row * ROW, columns * unit - GAP


def curve(a: str, b: str) -> str:
    """An arrow from box a to box b, leaving where b is and arriving where a is."""
    (ax, ay, aw), (bx, by, bw) = place(a), place(b)
    clamp = lambda x, left, width: min(max(x, left + 0.2 * width), left + 0.8 * width)  # noqa: E731
    x1, x2 = clamp(bx + bw / 2, ax, aw), clamp(ax + aw / 2, bx, bw)
    y1, y2 = (ay + HEIGHT, by - 5) if by > ay else (ay, by + HEIGHT + 5)
    if by == ay:
        x1, x2, y1, y2 = (ax + aw, bx - 5, ay + 31, by + 31) if bx > ax else (ax, bx + bw + 5, ay + 31, by + 31)
    bend = (y2 - y1) / 2
    dashed = "" if by >= ay else ' stroke-dasharray="4 4"'
    path = f"M{x1:.0f},{y1:.0f}C{x1:.0f},{y1 + bend:.0f} {x2:.0f},{y2 - bend:.0f} {x2:.0f},{y2:.0f}"
    return f'<path class="a" d="{path}"{dashed} marker-end="url(#h)"><title>{a} imports {b}</title></path>'


def draw() -> str:
    """The picture as SVG; it follows the light or dark theme of its reader."""
    height = ROW * max(row for _, row, *_ in BOXES.values()) + HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-2 -2 {WIDTH + 4} {height + 4}" role="img">',
        "<title>What imports what</title><style>text{font-family:system-ui,Helvetica,Arial,sans-serif;fill:#23262b}"
        ".t{font-size:17px;font-weight:600}.s{font-size:12.5px;fill:#60656e}.b{fill:#f6f4ef;stroke:#b9b4a9}"
        ".a{fill:none;stroke:#2a66b1;stroke-width:1.6}.h{fill:#2a66b1}@media (prefers-color-scheme:dark)"
        "{text{fill:#e4e6ea}.s{fill:#9aa1ab}.b{fill:#1b1e23;stroke:#4a505a}.a{stroke:#83b4ef}.h{fill:#83b4ef}}</style>",
        '<marker id="h" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path class="h" d="M0,0L8,4L0,8z"/></marker>',
    ]
    for name, (what, *_) in BOXES.items():
        x, y, width = place(name)
        parts.append(f'<rect class="b" x="{x:.0f}" y="{y}" width="{width:.0f}" height="{HEIGHT}" rx="8"/>')
        middle = f'x="{x + width / 2:.0f}" text-anchor="middle"'
        parts.append(f'<text class="t" {middle} y="{y + 26}">{name}</text>')
        parts.append(f'<text class="s" {middle} y="{y + 46}">{what}</text>')
    parts += [curve(a, b) for a, b in sorted(arrows(imports()))]
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "images" / "architecture.svg").write_text(draw(), encoding="utf-8")
