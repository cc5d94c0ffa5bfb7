r"""From a problem to what the model reads.

    plain   the problem
    boxed   L1's base prompt: the problem and "Let's think step by step and output the final answer within \boxed{}."
    chat    the same in the tokenizer's chat template; messages of verl's schema are passed as they are
    dial    the embedded task (a budget there is a token in front, see dial.prompt_text)

A problem with a length budget gets L1's sentence behind the text, before any chat template is applied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from jaxrl.algorithms.length import prompt_suffix
from jaxrl.errors import UserError
from jaxrl.tasks import dial
from jaxrl.types import Problem

BOXED = " Let's think step by step and output the final answer within \\boxed{}."
CHOICE = " Let's think step by step and output the letter of the correct option within \\boxed{}."
TEMPLATES = ("plain", "boxed", "chat", "dial")


class _Tokenizer(Protocol):
    bos_id: int | None

    def encode(self, text: str) -> list[int]: ...

    def apply_chat_template(self, messages: Sequence[dict], **options) -> list[int] | None: ...


def prompt_text(problem: Problem, template: str) -> str:
    """The text of a prompt, length budget included. For "chat": what the user says in it.

    Raises UserError for an unknown template or an impossible budget.
    """
    if template not in TEMPLATES:
        raise UserError(f"template {template!r}; valid: {', '.join(TEMPLATES)}")
    if template == "dial":
        return dial.prompt_text(problem)
    try:
        suffix = prompt_suffix(problem.mode, problem.budget)
    except ValueError as e:
        raise UserError(f"problem {problem.id!r}: {e}") from None
    instruction = "" if template == "plain" else CHOICE if problem.task == "choice" else BOXED
    return problem.prompt + instruction + suffix


def messages(problem: Problem, system: str = "") -> list[dict[str, str]]:
    """The conversation of a "chat" prompt. Messages that came with the data set (verl) are kept, and only a
    length budget is added to the last one of the user."""
    given = problem.info.get("messages")
    if not given:
        opening = [{"role": "system", "content": system}] if system else []
        return [*opening, {"role": "user", "content": prompt_text(problem, "chat")}]
    suffix = prompt_text(problem, "plain")[len(problem.prompt) :]
    last = max(i for i, m in enumerate(given) if m["role"] == "user")
    return [{**m, "content": m["content"] + suffix} if i == last else m for i, m in enumerate(given)]


def encode_prompt(problem: Problem, tokenizer: _Tokenizer, template: str, system: str = "", **options) -> list[int]:
    """Token ids of a prompt, with the BOS id in front where the model expects one.

    options go to the chat template (enable_thinking=False). Raises UserError if the tokenizer has none.
    """
    if template == "chat":
        ids = tokenizer.apply_chat_template(messages(problem, system), **options)
        if ids is None:
            raise UserError("template 'chat': this tokenizer has no chat template; valid: plain, boxed")
        return ids
    ids = tokenizer.encode(prompt_text(problem, template))
    return ids if tokenizer.bos_id is None else [tokenizer.bos_id, *ids]
