"""Stream a completion of a prompt.

    python -m jaxrl.generate --model=DIR "Once upon a time"

DIR is a Hugging Face directory or a run directory. The prompt goes through the tokenizer's chat template if it has
one and --chat is not false. Flags and their defaults: --max_new_tokens=256 --temperature=1.0 --top_k=0 --top_p=1.0
--min_p=0.0 --seed=0 --samples=1 --chat=true --dtype=float32 --products= (bfloat16: as model.products in training)
--pages=-1 (tokens per page of the KV cache, 0 for a dense cache; -1: as a run was trained) --prompt_logprobs=false
(true: the log-probability of each token of the prompt but the first). --system_prompt=TEXT and --enable_thinking=on|off
(for templates that have the switch) default to what a run was trained with. Text goes to stdout, the rest to stderr.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time

from jaxrl.algorithms.hyper import Flag, Integer
from jaxrl.errors import UserError
from jaxrl.runtime import cli

DEFAULTS = dict(
    model=str, **cli.SAMPLING_FLAGS, max_new_tokens=Integer(256, 1), seed=0, samples=Integer(1, 1), chat=Flag(True),
    **cli.CHAT_FLAGS, prompt_logprobs=Flag(False),
)  # fmt: skip


def main(argv: list[str]) -> int:
    """The command line above; returns the exit code. Raises UserError for flags that cannot be used."""
    flags = cli.parse_flags(argv, DEFAULTS, __doc__)
    if len(flags["positional"]) != 1:
        raise UserError('need one prompt: python -m jaxrl.generate --model=DIR "prompt"')
    import jax
    import jax.numpy as jnp

    from jaxrl import memory
    from jaxrl.rollout.engine import Engine, SamplingParams
    from jaxrl.rollout.requests import decodable
    from jaxrl.runtime.model_source import load_model, run_settings
    from jaxrl.tasks.templates import prompt_options

    sampling = SamplingParams(*(flags[name] for name in ("temperature", "top_k", "top_p", "min_p")))
    cli.use_compilation_cache()
    config, params, tokenizer = load_model(flags["model"], jnp.dtype(flags["dtype"]))
    given = {key: flags[key] for key in cli.CHAT_FLAGS if flags[key]}
    run = run_settings(flags["model"])
    trained = run.get("task", {}) if flags["chat"] else {}
    prompt = encode(tokenizer, flags["positional"][0], flags["chat"], **prompt_options(trained | given))
    room = config.max_position_embeddings - len(prompt)
    if room < 1:
        raise UserError(f"the prompt has {len(prompt)} tokens, the model a context of {config.max_position_embeddings}")
    limit = min(flags["max_new_tokens"], room)
    sizes, dtype = dict(max_prompt=len(prompt), max_tokens=limit, slots=1), jnp.dtype(flags["dtype"])
    sizes |= memory.cache_sizes(config, dtype, None, jax.local_devices()[0], **sizes, pages=memory.pages_of(flags, run),
                                lives=lambda: memory.bytes_of(params))
    sizes |= dict(chunk=8, dtype=dtype, allowed=decodable(tokenizer, config.vocab_size))
    config = dataclasses.replace(config, narrow=flags["products"] == "bfloat16")
    sampler = Engine(config, tokenizer.eos_ids, **sizes)
    params = sampler.layout(params)
    if flags["prompt_logprobs"]:
        (logprobs,) = sampler.prompt_logprobs(params, [prompt])
        for token, logprob in zip(prompt[1:].tolist(), logprobs, strict=True):
            print(f"{logprob:8.3f}  {tokenizer.decode([token], False)!r}", file=sys.stderr)
        print(f"[prompt of {len(prompt)} tokens, log-prob {logprobs.sum():.1f}]", file=sys.stderr)
    for sample in range(flags["samples"]):
        if sample:
            print("\n" + "-" * 40)
        begin = time.perf_counter()
        completion = stream(sampler, params, tokenizer, prompt, limit=limit, sample=sample,
                            seed=flags["seed"] % 2**32, sampling=sampling)  # fmt: skip
        rate = completion.length / (time.perf_counter() - begin)
        what = f"{completion.length} tokens, {completion.finish}, {rate:.0f} tokens/s"
        print(f"\n[{what}, log-prob {completion.logprobs.sum():.1f}]", file=sys.stderr)
    return 0


def encode(tokenizer, text: str, chat: bool, system: str = "", enable_thinking: bool | None = None):
    """int32 [p] prompt ids: by the chat template (system, enable_thinking: see encode_prompt), or BOS and the plain
    text. Raises UserError if there are none, or for text or options that the tokenizer cannot encode.
    """
    import numpy as np

    from jaxrl.tasks.templates import encode_prompt
    from jaxrl.types import Problem

    chat = chat and tokenizer.chat_template is not None
    if (system or enable_thinking is not None) and not chat:
        raise UserError("--system_prompt and --enable_thinking need a tokenizer with a chat template, and --chat=true")
    asked = Problem("prompt", text, "", info={"messages": [{"role": "user", "content": text}]})
    try:
        ids = encode_prompt(asked, tokenizer, "chat" if chat else "plain", system, enable_thinking)
    except ValueError as e:
        raise e if isinstance(e, UserError) else UserError(str(e)) from None
    if not ids:
        raise UserError("the prompt is empty, and the tokenizer has no BOS to start from")
    return np.array(ids, np.int32)


def stream(sampler, params, tokenizer, prompt, *, limit: int, sample: int, seed: int, sampling):
    """Print one completion while it is sampled; returns it."""
    from jaxrl.rollout.engine import Request
    from models.tokenizers import stream_text

    sampler.submit(Request(prompt, 1, limit, 0, first_sample=sample), seed=seed)
    completion = None

    def ids():
        nonlocal completion
        while completion is None:
            for event in sampler.step(params, sampling):
                completion = event.completion
                yield from event.tokens.tolist()

    # a tokenizer may drop the space before the first token, so that token is the last one of the prompt
    last = int(prompt[-1])
    skip = len(tokenizer.decode([last]))
    for text in stream_text(tokenizer, itertools.chain([last], ids())):
        print(text[skip:], end="", flush=True)
        skip = max(skip - len(text), 0)
    return completion


if __name__ == "__main__":
    cli.run(main)
