"""Writes docs/config.md from the table of settings in jaxrl/runtime/config.py.

    python docs/settings.py
"""

import pathlib

from jaxrl.runtime.config import METHODS, SETTINGS

FILE = pathlib.Path(__file__).parent / "config.md"
OPENING = """# Settings

Every key of the configuration. A config file changes them in `get_config`, the command line with
`--config.batch.prompts=32`. A value that is not what its row says is refused in one line, before anything is
compiled. This page is written by `python docs/settings.py` from the table in `jaxrl/runtime/config.py`.
"""
HEAD = "| key | default | what it may be | meaning |\n|---|---|---|---|"
CLOSING = """
## Constants of methods

Each is a key, as `config.algorithm.loss_hyper.dapo.clip_high`, whether its method is chosen or not. What they mean
stands beside the formulas in [algorithms.md](algorithms.md).
"""


def cell(text: object) -> str:
    return str(text).replace("|", "\\|") or "`\"\"`"


def value(default: object) -> str:
    return f"`{default!r}`".replace("'", '"')


def page() -> str:
    """The whole page."""
    lines, section = [OPENING], None
    for key, (setting, meaning) in sorted(SETTINGS.items(), key=lambda item: "." in item[0]):  # the run's own first
        first = key.partition(".")[0] if "." in key else "The run"
        if first != section:
            section = first
            lines += ["", f"## {section}", "", HEAD]
        lines.append(f"| `{key}` | {value(setting.default)} | {cell(setting)} | {meaning} |")
    lines.append(CLOSING.rstrip("\n"))
    for section, table in METHODS.items():
        lines += ["", f"### {section}", "", "| method | constant | default | what it may be |", "|---|---|---|---|"]
        for name, entry in table.items():
            for constant, kind in entry.constants.items():
                lines.append(f"| `{name}` | `{constant}` | {value(kind.default)} | {cell(kind)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
