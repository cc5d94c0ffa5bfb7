"""What every entry point shares: errors of the user become one line, flags are parsed without globals."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable

from jaxrl.algorithms.hyper import Choice, Integer, Number
from jaxrl.errors import UserError
from jaxrl.runtime import storage


def run(main: Callable[[list[str]], int | None]) -> None:
    """Call main(sys.argv) and exit with its code; a UserError is one line on stderr and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # PyTorch is missing on purpose
    try:
        code = main(sys.argv)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        code = 2
    sys.stdout.flush()
    sys.exit(code or 0)


# What generate and evaluate share.
SAMPLING_FLAGS = dict(
    temperature=Number(1.0),
    top_k=Integer(0),
    top_p=Number(1.0, 0, 1, above=True),
    min_p=Number(0.0, 0, 1),
    dtype=Choice("float32", ("float32", "bfloat16")),
    products=Choice("", ("", "bfloat16")),  # as model.products
    pages=Integer(-1, -1),  # as sampling.pages; -1: as a run was trained
)
# How a chat template is used; empty: as a run was trained, or as the template does it.
CHAT_FLAGS = dict(system_prompt="", enable_thinking=Choice("", ("", "default", "on", "off")))


def parse_flags(argv: list[str], defaults: dict, usage: str) -> dict:
    """`--name=value` (or `--name value`) flags with typed defaults.

    A default of type `type` marks a required flag; one of `jaxrl.algorithms.hyper` (Number, Integer, Choice, Flag)
    also says which values it takes. Raises UserError for unknown, missing or ill-typed flags and such values.
    """
    start = {k: getattr(v, "default", v) for k, v in defaults.items()}
    values = {k: v for k, v in start.items() if not isinstance(v, type)}
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
        kind = start[name] if isinstance(start[name], type) else type(start[name])
        if "=" not in arg:
            text = "true" if kind is bool else next(args, None)
        values[name] = _read(name, text, kind, defaults[name])
    missing = [k for k in defaults if k not in values]
    if missing:
        raise UserError(f"--{missing[0]} is missing\n{usage}")
    values["positional"] = positional
    return values


_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def _read(name: str, text: str | None, kind: type, setting):
    """The value of a flag's text, as parse_flags describes."""
    accepts = getattr(setting, "accepts", lambda value: kind is not float or math.isfinite(value))
    need = str(setting) if hasattr(setting, "accepts") else {bool: "true or false", float: "a finite number"}.get(kind)
    try:
        value = _BOOLEANS[(text or "").lower()] if kind is bool else kind(text) if text is not None else None
        if value is None or not accepts(value):
            raise ValueError
    except (KeyError, ValueError):
        raise UserError(f"--{name}={text!r}: must be {need or f'of type {kind.__name__}'}") from None
    return value


def use_compilation_cache(run_dir: str = "") -> None:
    """Keep compiled programs, so that a second start compiles nothing: in JAX_COMPILATION_CACHE_DIR; else, for a run on
    an object store, in `xla` beside the run, as a new machine has no cache of its own; else in the user's cache
    directory."""
    import jax

    if given := jax.config.jax_compilation_cache_dir:
        storage.as_path(given, "JAX_COMPILATION_CACHE_DIR")
    else:
        root = os.environ.get("XDG_CACHE_HOME", os.path.join(os.path.expanduser("~"), ".cache"))
        run = run_dir.rstrip("/")
        bucket = storage.is_remote(run) and run.count("/") == 2  # a bucket has nothing beside it
        beside = os.path.join(run if bucket else os.path.dirname(run), "xla")
        where = beside if storage.is_remote(beside) else os.path.join(root, "jaxrl", "xla")
        jax.config.update("jax_compilation_cache_dir", where)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if storage.is_remote(jax.config.jax_compilation_cache_dir):  # XLA's own caches of GPU kernels know only local files
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
