"""Stream a completion of a prompt.

    python -m jaxrl.generate --model=DIR "Once upon a time"

DIR is a Hugging Face directory or a run directory. The prompt goes through the tokenizer's chat template if it has
one and --chat is not false. Flags and their defaults: --max_new_tokens=256 --temperature=1.0 --top_k=0 --top_p=1.0
--min_p=0.0 --seed=0 --samples=1 --chat=true --dtype=float32 --prompt_logprobs=false (true: the log-probability of
each token of the prompt but the first). Text goes to stdout, the rest to stderr.
"""

from __future__ import annotations

import itertools
import queue
import sys
import threading
import time

from jaxrl.algorithms.hyper import Flag, Integer
from jaxrl.errors import UserError
from jaxrl.runtime import cli

DEFAULTS = dict(
    model=str, **cli.SAMPLING_FLAGS, max_new_tokens=Integer(256, 1), seed=0, samples=Integer(1, 1), chat=Flag(True),
    prompt_logprobs=Flag(False),
)  # fmt: skip


def main(argv: list[str]) -> int:
    """The command line above; returns the exit code. Raises UserError for flags that cannot be used."""
    flags = cli.parse_flags(argv, DEFAULTS, __doc__)
    if len(flags["positional"]) != 1:
        raise UserError('need one prompt: python -m jaxrl.generate --model=DIR "prompt"')
    import jax.numpy as jnp

    from jaxrl.rollout.engine import Engine, SamplingParams
    from jaxrl.runtime.model_source import load_model

    sampling = SamplingParams(*(flags[name] for name in ("temperature", "top_k", "top_p", "min_p")))
    cli.use_compilation_cache()
    config, params, tokenizer = load_model(flags["model"], jnp.dtype(flags["dtype"]))
    prompt = encode(tokenizer, flags["positional"][0], flags["chat"])
    room = config.max_position_embeddings - len(prompt)
    if room < 1:
        raise UserError(f"the prompt has {len(prompt)} tokens, the model a context of {config.max_position_embeddings}")
    limit = min(flags["max_new_tokens"], room)
    sizes = dict(max_prompt=len(prompt), max_tokens=limit, slots=1, chunk=8)
    sampler = Engine(config, tokenizer.eos_ids, **sizes, dtype=flags["dtype"])
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
        completion = stream(sampler, params, tokenizer, prompt, limit, sample, flags["seed"] % 2**32, sampling)
        rate = completion.length / (time.perf_counter() - begin)
        what = f"{completion.length} tokens, {completion.finish}, {rate:.0f} tokens/s"
        print(f"\n[{what}, log-prob {completion.logprobs.sum():.1f}]", file=sys.stderr)
    return 0


def encode(tokenizer, text: str, chat: bool):
    """int32 [p] prompt ids: the chat template's, or the plain text's after BOS. Raises UserError if empty."""
    import numpy as np

    try:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": text}]) if chat else None
        if ids is None:
            ids = [*([] if tokenizer.bos_id is None else [tokenizer.bos_id]), *tokenizer.encode(text)]
    except ValueError as e:  # text that a toy vocabulary has no tokens for, or a broken chat template
        raise UserError(str(e)) from None
    if not ids:
        raise UserError("the prompt is empty, and the tokenizer has no BOS to start from")
    return np.array(ids, np.int32)


def stream(sampler, params, tokenizer, prompt, limit: int, sample: int, seed: int, sampling):
    """Print one completion while it is sampled; returns it."""
    from jaxrl.rollout.engine import Request
    from models.tokenizers import stream_text

    ids: queue.Queue = queue.Queue()
    out: list = []

    def send(_, __, tokens):
        for token in tokens:
            ids.put(int(token))

    def work():
        request = Request(prompt, 1, limit, 0, first_sample=sample)
        try:
            [[completion]] = sampler.generate(params, [request], seed=seed, sampling=sampling, on_tokens=send)
            out.append(completion)
        except BaseException as e:  # handed to the thread that prints
            out.append(e)
        ids.put(None)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    # a tokenizer may drop the space before the first token it sees, so it sees the prompt's last one too
    last = int(prompt[-1])
    skip = len(tokenizer.decode([last]))
    for text in stream_text(tokenizer, itertools.chain([last], iter(ids.get, None))):
        print(text[skip:], end="", flush=True)
        skip = max(skip - len(text), 0)
    worker.join()
    if isinstance(out[0], BaseException):
        raise out[0]
    return out[0]


if __name__ == "__main__":
    cli.run(main)
