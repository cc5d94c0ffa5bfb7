"""Answers from a model behind a server with the OpenAI-compatible API (vLLM, SGLang, llama.cpp, ...).

A "chat" prompt goes to /chat/completions as messages, so that the server's own chat template is used; any other goes to
/completions as text. A response's length is what the server counted (usage.completion_tokens).
"""

from __future__ import annotations

import concurrent.futures
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import httpx

from jaxrl.errors import UserError
from jaxrl.evaluation.scoring import Records, graded_records
from jaxrl.types import Problem

RETRIED = (408, 409, 425, 429)  # the server may do it later, as with 5xx; other refusals are final


class Server:
    """A served model. url: up to and including /v1. model: its name there. retries: further tries, after 1, 2,
    4 ... seconds, of a request that fails for a reason that may pass. timeout: seconds a request may take. wait: for
    tests."""

    def __init__(self, url: str, model: str, *, key: str = "", concurrency: int = 8, retries: int = 6,
                 timeout: float = 600.0, wait: Callable[[float], Any] = time.sleep):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.client = httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=timeout, trust_env=False)
        self.url, self.model, self.retries, self.wait = url, model, retries, wait
        self.pool = concurrent.futures.ThreadPoolExecutor(concurrency)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_) -> None:
        self.pool.shutdown(cancel_futures=True)
        self.client.close()

    def post(self, path: str, body: dict) -> dict:
        """The server's answer to a request. Raises UserError, one line, if it refuses or does not answer."""
        said = ""
        for attempt in range(self.retries + 1):
            if attempt:
                self.wait(2.0 ** (attempt - 1))
            try:
                response = self.client.post(path, json=body)
            except httpx.TransportError as e:
                said = f"{type(e).__name__} {e}"
                continue
            if response.status_code == 200:
                try:
                    return response.json()
                except ValueError:
                    said = "an answer that is not JSON"
                    continue
            said = f"{response.status_code} {' '.join(response.text.split())[:200]}"
            if response.status_code not in RETRIED and response.status_code < 500:
                raise UserError(f"--server={self.url}: {path} answered {said}")
        raise UserError(f"--server={self.url}: {path} failed {self.retries + 1} times, the last time: {said}")

    def complete(self, prompt: str | list[dict], settings: dict) -> dict:
        """One sample: {"text", "tokens", "prompt_tokens", "finish"}. prompt: text, or messages."""
        chat = not isinstance(prompt, str)
        body = {"model": self.model, **settings, ("messages" if chat else "prompt"): prompt}
        answer = self.post("/chat/completions" if chat else "/completions", body)
        try:
            choice, usage = answer["choices"][0], answer["usage"]
            message = choice["message"] if chat else choice
            text = (message.get("content") or "") if chat else choice["text"]
            if thinking := chat and message.get("reasoning_content"):  # some servers cut it out of the text
                text = f"<think>{thinking}" + (f"</think>{text}" if text else "")  # cut off while it was thinking
            tokens, asked = int(usage["completion_tokens"]), int(usage.get("prompt_tokens", 0))
            text = text.encode("utf-8", "replace").decode("utf-8")  # unpaired surrogates cannot be stored
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as e:
            raise UserError(f"--server={self.url}: an answer without choices or usage.completion_tokens: {e}") from None
        finish = "length" if choice.get("finish_reason") == "length" else "eos"
        return {"text": text, "tokens": tokens, "prompt_tokens": asked, "finish": finish}


def ask(
    server: Server, problems: Sequence[Problem], prompts: Sequence[str | list[dict]], grade: Callable, *,
    samples: int, seed: int, max_tokens: int, settings: dict, vote: Callable | None,
) -> Records:  # fmt: skip
    """Records (see scoring.evaluate_problems) of `samples` answers to every problem, many requests at a time.

    settings: temperature and what else the API takes. The seed of a sample is a function of (seed, problem id, sample
    index); a server may ignore it. Raises UserError as Server.post does.
    """
    jobs = [
        server.pool.submit(server.complete, prompt, settings | {"max_tokens": max_tokens, "seed": _seed(seed, p, i)})
        for p, prompt in zip(problems, prompts, strict=True)
        for i in range(samples)
    ]
    try:
        drawn = [job.result() for job in jobs]
    finally:
        for job in jobs:
            job.cancel()
    groups = [drawn[i * samples : (i + 1) * samples] for i in range(len(problems))]
    return graded_records(problems, [g[0]["prompt_tokens"] for g in groups], groups, grade, vote)


def _seed(seed: int, problem: Problem, sample: int) -> int:
    return zlib.crc32(f"{seed}/{problem.id}/{sample}".encode()) % 2**31
