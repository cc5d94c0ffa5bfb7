"""What every entry point shares: errors of the user become one line, flags are parsed without globals."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable

from jaxrl.errors import UserError


def run(main: Callable[[list[str]], int | None]) -> None:
    """Call main(sys.argv) and exit with its code; a UserError is one line on stderr and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        code = main(sys.argv)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        code = 2
    sys.stdout.flush()
    sys.exit(code or 0)


def parse_flags(argv: list[str], defaults: dict, usage: str) -> dict:
    """`--name=value` (or `--name value`) flags with typed defaults.

    A default of type `type` marks a required flag. Raises UserError for unknown, missing or ill-typed flags.
    """
    values = {k: v for k, v in defaults.items() if not isinstance(v, type)}
    positional = []
    args = iter(argv[1:])
    for arg in args:
        if arg in ("-h", "--help"):
            print(usage)
            raise SystemExit(0)
        if not arg.startswith("--"):
            positional.append(arg)
            continue
        name, _, text = arg[2:].partition("=")
        if name not in defaults:
            raise UserError(f"unknown flag --{name}; valid: {', '.join('--' + k for k in defaults)}")
        kind = defaults[name] if isinstance(defaults[name], type) else type(defaults[name])
        if "=" not in arg:
            text = "true" if kind is bool else next(args, None)
        try:
            if text is None:
                raise ValueError
            values[name] = text.lower() in ("1", "true", "yes") if kind is bool else kind(text)
        except ValueError:
            raise UserError(f"--{name}={text!r}: expected {kind.__name__}") from None
    missing = [k for k in defaults if k not in values]
    if missing:
        raise UserError(f"--{missing[0]} is missing\n{usage}")
    values["positional"] = positional
    return values


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache directory, so that a second start compiles nothing."""
    import jax

    if not jax.config.jax_compilation_cache_dir:
        root = os.environ.get("XDG_CACHE_HOME", os.path.join(os.path.expanduser("~"), ".cache"))
        jax.config.update("jax_compilation_cache_dir", os.path.join(root, "jaxrl", "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
