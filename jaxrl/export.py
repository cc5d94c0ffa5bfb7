"""A run's model as a Hugging Face directory that transformers (and vLLM, SGLang, ...) loads, or as orbax's arrays.

    python -m jaxrl.export RUN OUT_DIR [--adapters] [--format=orbax]

Writes the weights of the newest checkpoint (--step=N for another) in the dtype they have there (--dtype=bfloat16 for
another), config, tokenizer with its chat template, and a generation config that samples as training did. If the run
trained adapters (config.model.lora), they are merged into their base; --adapters writes only them, in peft's format.
--format=orbax writes OUT_DIR/params, which orbax's StandardCheckpointer restores in other JAX code: the tree of
models/table.py, layers stacked on axis 0; config.json and the tokenizer lie beside it. OUT_DIR must be new or empty.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax

from jaxrl import build
from jaxrl.algorithms.hyper import Choice, Flag, Integer
from jaxrl.errors import UserError
from jaxrl.runtime import cli, storage
from jaxrl.runtime import mesh as meshes
from jaxrl.runtime.model_source import is_run, load_model, load_run_adapters, run_settings, stored_dtype
from jaxrl.runtime.storage import atomic_write
from models.config import to_hf
from models.lora import save_adapters
from models.tokenizers import VocabTokenizer
from models.weights import save_params

FLAGS = dict(
    step=Integer(-1, -1), dtype=Choice("", ("", "float32", "bfloat16", "float16")), adapters=Flag(False),
    format=Choice("hf", ("hf", "orbax")),
)  # fmt: skip


def main(argv: list[str]) -> None:
    """The command line above. Raises UserError for what cannot be exported, or a directory that is in use."""
    flags = cli.parse_flags(argv, FLAGS, __doc__)
    if len(flags["positional"]) != 2:
        raise UserError("need a run and a directory to write: python -m jaxrl.export RUN OUT_DIR")
    run, out = flags["positional"]
    step = None if flags["step"] < 0 else flags["step"]
    if flags["adapters"] and flags["format"] == "orbax":
        raise UserError("--adapters writes PEFT's files: leave out --format=orbax")
    kinds = {name: flags[name] for name in ("dtype", "adapters", "format")}
    config, size = export(run, out, step=step, **kinds)
    what = "adapters of " if flags["adapters"] else ""
    print(f"written to {out}: {what}a {config.model_type} with {size:,} parameters")


def export(run: str, out: str, *, step: int | None = None, dtype: str = "", adapters: bool = False,
           format: str = "hf") -> tuple[Any, int]:
    """Writes the directory; returns (DecoderConfig, number of parameters written).

    step: of a checkpoint, None for the newest. dtype: of the weights, "" for the checkpoint's. adapters: only those.
    format: "hf" or "orbax".
    """
    if not is_run(run):
        raise UserError(f"{run} is not a run directory")
    there = storage.as_path(out, "OUT_DIR")
    with storage.user_errors("OUT_DIR"):
        taken = storage.children(there) or there.is_file()
    if taken:
        raise UserError(f"{out} is there already and not empty; choose another directory, or delete it")
    kept = storage.output(out, "OUT_DIR")
    target = kept.local
    if adapters:
        config, lora, params, base = load_run_adapters(run, step)
        params = jax.tree.map(lambda x: x.astype(dtype or x.dtype), params)
        save_adapters(target, params, config, lora, base)
        with storage.user_errors("OUT_DIR"):
            kept.close()
        return config, sum(leaf.size for leaf in jax.tree.leaves(params))
    mesh = meshes.make_mesh(1, -1, 1) if jax.device_count() > 1 else None
    shardings = (lambda config: build.param_shardings(config, mesh)[1]) if mesh else None
    config, params, tokenizer = load_model(run, dtype or stored_dtype(run, step), shardings, step)
    if format == "orbax":
        _save_orbax(target, params, config, tokenizer)
        with storage.user_errors("OUT_DIR"):
            kept.close()
        return config, sum(leaf.size for leaf in jax.tree.leaves(params))
    save_params(target, params, config, tokenizer)
    file = target / "generation_config.json"
    sampling = run_settings(run).get("sampling", {})
    sampling = {key: sampling[key] for key in ("temperature", "top_k", "top_p", "min_p") if key in sampling}
    content = json.loads(file.read_text()) | {"do_sample": True} | sampling
    atomic_write(file, json.dumps(content, indent=1) + "\n")
    if isinstance(tokenizer, VocabTokenizer):
        _save_pieces(tokenizer, target)
    with storage.user_errors("OUT_DIR"):
        kept.close()
    return config, sum(leaf.size for leaf in jax.tree.leaves(params))


def _save_orbax(target: pathlib.Path, params, config, tokenizer) -> None:
    from orbax.checkpoint import StandardCheckpointer

    target.mkdir(parents=True, exist_ok=True)
    tokenizer.save(target)
    atomic_write(target / "config.json", json.dumps(to_hf(config), indent=1) + "\n")
    with StandardCheckpointer() as saver:
        saver.save(target.absolute() / "params", params)


def _save_pieces(tokenizer: VocabTokenizer, target: pathlib.Path) -> None:
    """A list of pieces as the tokenizer.json that transformers reads: added tokens, which are matched longest first."""
    import tokenizers
    import transformers

    special = {f"{role}_token": piece for role, piece in tokenizer.special.items() if role != "sep"}
    vocabulary = {piece: i for i, piece in enumerate(tokenizer.pieces)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, tokenizer.special.get("unk", "")))
    inner.add_tokens([tokenizers.AddedToken(piece, normalized=False) for piece in tokenizer.pieces])
    inner.decoder = tokenizers.decoders.Fuse()
    template = tokenizer.chat_template
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=template, **special)
    (target / "vocab.json").unlink()
    fast.save_pretrained(target)


if __name__ == "__main__":
    cli.run(main)
