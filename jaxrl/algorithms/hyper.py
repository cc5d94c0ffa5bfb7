"""Looking up a method and its constants by name, the same way for every table of methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def resolve(table: Mapping[str, Any], kind: str, name: str, overrides: Mapping[str, Any] | None = None):
    """(table[name], its defaults updated by overrides).

    kind: what the table holds, for the message ("loss", "advantage", ...). Raises ValueError, naming what
    would be valid, for an unknown method or an unknown constant.
    """
    if name not in table:
        raise ValueError(f"unknown {kind} {name!r}; valid: {', '.join(sorted(table))}")
    entry, overrides = table[name], dict(overrides or {})
    unknown = sorted(set(overrides) - set(entry.defaults))
    if unknown:
        valid = ", ".join(sorted(entry.defaults)) or "none"
        raise ValueError(f"unknown constant {unknown[0]!r} of {kind} {name!r}; valid: {valid}")
    return entry, {**entry.defaults, **overrides}
