r"""From a problem to what the model reads.

    plain   the problem
    boxed   L1's base prompt: the problem and "Let's think step by step and output the final answer within \boxed{}."
    chat    the same in the tokenizer's chat template, after a system prompt if there is one; messages of verl's
            schema are passed as they are
    dial    the embedded task (a budget there is a token in front, see dial.prompt_text)

A problem with a length budget gets L1's sentence behind the text, before any chat template is applied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from jaxrl.errors import UserError
from jaxrl.tasks import dial
from jaxrl.tasks.answers import spoken
from jaxrl.types import Problem
from models.tokenizers import ChatTemplateError

BOXED = " Let's think step by step and output the final answer within \\boxed{}."
CHOICE = " Let's think step by step and output the letter of the correct option within \\boxed{}."
TEMPLATES = ("plain", "boxed", "chat", "dial")
THINKING = {"default": None, "on": True, "off": False}  # task.enable_thinking -> what the chat template is told


class _Tokenizer(Protocol):
    bos_id: int | None
    chat_template: str | dict[str, str] | None

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str: ...

    def apply_chat_template(self, messages: Sequence[dict], **options) -> list[int] | None: ...


def prompt_suffix(mode: str, budget: int | None) -> str:
    """What LCPO appends to the prompt: mode "exact", "max" or "none" -> text with a leading space, or "".

    Raises ValueError for another mode, or a budget below 1 in a mode that needs one.
    """
    if mode == "none":
        return ""
    if mode not in ("exact", "max"):
        raise ValueError(f"unknown budget mode {mode!r}; valid: none, exact, max")
    if budget is None or budget < 1:
        raise ValueError(f"budget mode {mode!r} needs a budget of at least 1 token, not {budget}")
    return f" Think for {budget} tokens." if mode == "exact" else f" Think for maximum {budget} tokens."


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
    """The conversation of a "chat" prompt, system prompt in front.

    Messages that came with the data set (verl) are kept, their own system prompt, too; only a length budget is added
    to the last one of the user.
    """
    given = problem.info.get("messages")
    if given:
        suffix = prompt_text(problem, "plain")[len(problem.prompt) :]
        last = max(i for i, m in enumerate(given) if m["role"] == "user")
        given = [{**m, "content": m["content"] + suffix} if i == last else m for i, m in enumerate(given)]
    else:
        given = [{"role": "user", "content": prompt_text(problem, "chat")}]
    opening = system and not any(m["role"] == "system" for m in given)
    return [{"role": "system", "content": system}, *given] if opening else given


def opening(prompt: Sequence[int], tokenizer: _Tokenizer) -> str:
    """The beginning of the response that a chat prompt (token ids) contains, for graders: an open <think>, or ""."""
    end = tokenizer.decode(prompt[-24:], skip_special=False)
    return "<think>" if spoken(end) is None else ""


def prompt_options(task: Mapping[str, str]) -> dict:
    """encode_prompt's options from a config's task section; the section of an older run has none."""
    thinking = THINKING[task.get("enable_thinking", "default")]
    return {"system": task.get("system_prompt", ""), "enable_thinking": thinking}


def encode_prompt(
    problem: Problem, tokenizer: _Tokenizer, template: str, system: str = "", enable_thinking: bool | None = None
) -> list[int]:
    """Token ids of a prompt, with the BOS id in front where the model expects one.

    For "chat": system is the system prompt ("" for none); enable_thinking goes to the chat template (None leaves its
    default). Raises UserError if the tokenizer has no chat template, or one that does not do what is asked.
    """
    if template != "chat":
        ids = tokenizer.encode(prompt_text(problem, template))
        return ids if tokenizer.bos_id is None else [tokenizer.bos_id, *ids]
    options = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    if tokenizer.chat_template is None:
        raise UserError("template 'chat': this tokenizer has no chat template; valid: plain, boxed")
    if options and "enable_thinking" not in str(tokenizer.chat_template):
        raise UserError("enable_thinking: the tokenizer's chat template has no such switch; leave it unset")
    try:
        return tokenizer.apply_chat_template(messages(problem, system), **options)
    except ChatTemplateError as e:
        raise UserError(str(e)) from None
