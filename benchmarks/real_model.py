"""Sampling from a real model: this sampler, Hugging Face generate and llama.cpp's server, on the same prompts.

    python benchmarks/real_model.py --model=SMOLLM2_DIR --data=gsm8k_test.jsonl --prompts=64 --samples=4

Each prompt is asked in the model's chat template and sampled several times at temperature 1, up to --tokens tokens or
until the model ends its answer; every engine draws its own answers, so the tokens are counted and not fixed.

Engines (--engines=A,B): `jaxrl` in float32 with --slots slots, `jaxrl-bf16` with the factors of products rounded
(model.products=bfloat16); `hf-32` and `hf-64`, transformers in float32 with so many rows in a batch; `llama-f32` and
`llama-f16`, llama.cpp with --slots parallel requests, whose server schedules them by itself (pip install xllamacpp
gguf; --gguf=FILE, any GGUF file of the same model, gives tokenizer and tensors: they are written anew in that type).

Each engine is a process of its own; they run in turn, --rounds times. --cores=1 pins everything to one core and
compares CPU seconds, which hold up under other load; --cores=0 compares wall time and needs a quiet machine.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

ENGINES = ("jaxrl", "jaxrl-bf16", "hf-32", "hf-64", "llama-f32", "llama-f16")
DEFAULTS = dict(model="", data="", gguf="", prompts=64, samples=4, tokens=200, slots=64, rounds=2, cores=1,
                engines="jaxrl,hf-64", engine="")


def encoded(flags: dict) -> tuple[list[list[int]], tuple[int, ...]]:
    """(token ids of each prompt in the chat template, ids that end an answer)."""
    from jaxrl.tasks.data import load_problems
    from models.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(flags["model"])
    problems = load_problems(flags["data"]).problems[: flags["prompts"]]
    asked = [tokenizer.apply_chat_template([{"role": "user", "content": p.prompt}]) for p in problems]
    return [list(ids) for ids in asked], tuple(tokenizer.eos_ids)


def run_own(flags: dict, prompts: list[list[int]], ends: tuple[int, ...], kind: str):
    """(function that samples everything and returns the number of tokens, name)."""
    import dataclasses

    import numpy as np

    from jaxrl.rollout.engine import Engine, Request
    from models.config import from_hf
    from models.weights import load_params

    config = from_hf(flags["model"])
    params = load_params(flags["model"], config)
    if kind == "bf16":
        config = dataclasses.replace(config, narrow=True)
    longest = max(map(len, prompts))
    engine = Engine(config, ends, max_prompt=longest, max_tokens=flags["tokens"], slots=flags["slots"], chunk=32)
    params = engine.layout(params)
    requests = [Request(np.array(p, np.int32), flags["samples"], flags["tokens"], i) for i, p in enumerate(prompts)]

    def sample(seed: int) -> int:
        engine.generate(params, requests, seed=seed)
        return engine.stats.tokens

    return sample


def run_hf(flags: dict, prompts: list[list[int]], ends: tuple[int, ...], kind: str):
    """The same with transformers: prompts padded on the left, --samples rows a prompt, `kind` rows a batch."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(flags["cores"] or os.cpu_count())
    model = AutoModelForCausalLM.from_pretrained(flags["model"], dtype=torch.float32).eval()
    rows = [p for p in prompts for _ in range(flags["samples"])]

    @torch.no_grad()
    def sample(seed: int) -> int:
        torch.manual_seed(seed)
        total = 0
        for first in range(0, len(rows), int(kind)):
            batch = rows[first : first + int(kind)]
            width = max(map(len, batch))
            ids = torch.tensor([[ends[0]] * (width - len(p)) + p for p in batch])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
            out = model.generate(input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0,
                                 top_p=1.0, repetition_penalty=1.0, max_new_tokens=flags["tokens"],
                                 eos_token_id=list(ends), pad_token_id=ends[0])
            for row in out[:, width:].tolist():
                total += next((i + 1 for i, t in enumerate(row) if t in ends), len(row))
        return total

    return sample


def rewritten(source: str, kind: str, target: str) -> None:
    """The GGUF file `source` with every matrix in float32 or float16 ("f32", "f16"); vectors stay in float32."""
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(source)
    arch = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, arch)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        sub = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub)
    dtype = np.float16 if kind == "f16" else np.float32
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, values.astype(dtype if values.ndim > 1 else np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()


def run_llama(flags: dict, prompts: list[list[int]], ends: tuple[int, ...], kind: str):
    """The same by llama.cpp's server in this process, --slots requests at a time."""
    import xllamacpp

    path = os.path.join(tempfile.mkdtemp(), f"{kind}.gguf")
    rewritten(flags["gguf"], kind, path)
    params = xllamacpp.CommonParams()
    room = -(-(max(map(len, prompts)) + flags["tokens"] + 1) // 32) * 32
    params.model.path, params.n_parallel, params.n_ctx, params.port = path, flags["slots"], flags["slots"] * room, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = flags["cores"] or os.cpu_count()
    params.warmup = False
    server = xllamacpp.Server(params)
    rows = [p for p in prompts for _ in range(flags["samples"])]

    def ask(prompt: list[int], seed: int) -> int:
        body = dict(prompt=prompt, n_predict=flags["tokens"], temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=seed)
        request = urllib.request.Request(f"{server.listening_address}/completion", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=3600) as answer:
            return json.load(answer)["tokens_predicted"]

    def sample(seed: int) -> int:
        with concurrent.futures.ThreadPoolExecutor(flags["slots"]) as pool:
            return sum(pool.map(ask, rows, range(seed * len(rows), (seed + 1) * len(rows))))

    return sample


def measure(flags: dict) -> None:
    """One engine in this process: what it compiles first is not counted."""
    prompts, ends = encoded(flags)
    name, _, kind = flags["engine"].partition("-")
    run = {"jaxrl": run_own, "hf": run_hf, "llama": run_llama}[name]
    sample = run(flags, prompts, ends, kind)
    if name == "jaxrl":
        sample(0)  # compiles
    wall, cpu = time.perf_counter(), time.process_time()
    tokens = sample(1)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    spent = cpu if flags["cores"] == 1 else wall
    print(json.dumps(dict(engine=flags["engine"], tokens=tokens, wall_s=round(wall, 1), cpu_s=round(cpu, 1),
                          tokens_per_s=round(tokens / spent, 1))), flush=True)


def main(argv: list[str]) -> None:
    from jaxrl.runtime import cli

    flags = cli.parse_flags(argv, DEFAULTS, __doc__)
    engines = flags["engines"].split(",")
    if wrong := [e for e in engines if e not in ENGINES]:
        sys.exit(f"--engines: {wrong[0]!r} is none of {', '.join(ENGINES)}")
    if not flags["model"] or not flags["data"]:
        sys.exit("--model=DIR and --data=FILE are needed")
    if flags["engine"]:
        return measure(flags)
    if flags["cores"]:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-flags["cores"] :])
        os.environ["OMP_NUM_THREADS"] = str(flags["cores"])
    rates: dict[str, list[float]] = {engine: [] for engine in engines}
    for _ in range(flags["rounds"]):
        for engine in engines:
            command = [sys.executable, __file__, *argv[1:], f"--engine={engine}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{engine} failed:\n{done.stderr[-2000:]}")
            line = done.stdout.strip().splitlines()[-1]
            print(line, flush=True)
            rates[engine].append(json.loads(line)["tokens_per_s"])
    for engine, found in rates.items():
        ratios = [round(a / b, 2) for a, b in zip(rates[engines[0]], found, strict=True)]
        rate, ratio = statistics.median(found), statistics.median(ratios)
        print(f"{engine:12} {rate:8.1f} tokens/s   {engines[0]} is {ratio:.2f} x {ratios}")


if __name__ == "__main__":
    from jaxrl.runtime import cli

    cli.run(main)
