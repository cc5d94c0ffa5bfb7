"""Prompts as the model reads them."""

import json

import pytest

from jaxrl import generate
from jaxrl.errors import UserError
from jaxrl.runtime.config import base_config, validate
from jaxrl.tasks import dial
from jaxrl.tasks.grader import Grader
from jaxrl.tasks.load import open_task
from jaxrl.tasks.rewards import grade_group
from jaxrl.tasks.templates import (
    BOXED,
    encode_prompt,
    messages,
    opening,
    prompt_options,
    prompt_suffix,
    prompt_text,
)
from jaxrl.types import Problem
from models.tokenizers import load_tokenizer, vocab_tokenizer
from tests.shared import shared_path

QUESTION = "What is 1+1?"
BASE = QUESTION + r" Let's think step by step and output the final answer within \boxed{}."


def problem(**kwargs):
    return Problem("q", QUESTION, "2", **kwargs)


def test_plain_and_boxed():
    assert prompt_text(problem(), "plain") == QUESTION
    assert prompt_text(problem(), "boxed") == BASE
    assert r"letter of the correct option within \boxed{}" in prompt_text(problem(task="choice"), "boxed")


def test_length_budgets_follow_the_text():
    exact, at_most = problem(budget=512, mode="exact"), problem(budget=512, mode="max")
    assert prompt_text(exact, "boxed") == BASE + " Think for 512 tokens."
    assert prompt_text(at_most, "boxed") == BASE + " Think for maximum 512 tokens."
    assert prompt_text(exact, "plain") == QUESTION + " Think for 512 tokens."
    assert messages(at_most)[-1]["content"] == BASE + " Think for maximum 512 tokens."


def test_prompt_suffixes():
    assert prompt_suffix("exact", 512) == " Think for 512 tokens."
    assert prompt_suffix("max", 512) == " Think for maximum 512 tokens."
    assert prompt_suffix("none", None) == "" == prompt_suffix("none", 5)
    with pytest.raises(ValueError, match="unknown budget mode 'min'; valid: none, exact, max"):
        prompt_suffix("min", 5)
    for bad in (None, 0):
        with pytest.raises(ValueError, match="needs a budget of at least 1 token"):
            prompt_suffix("exact", bad)


def test_messages_of_the_data_set_are_kept():
    given = [{"role": "system", "content": "S"}, {"role": "user", "content": QUESTION}]
    p = problem(info={"messages": given})
    assert messages(p) == given and messages(p, system="ignored") == given
    budgeted = messages(problem(info={"messages": given}, budget=9, mode="exact"))
    assert budgeted == [given[0], {"role": "user", "content": QUESTION + " Think for 9 tokens."}]
    assert given[1]["content"] == QUESTION
    assert messages(problem(), system="S") == [given[0], {"role": "user", "content": BASE}]
    assert messages(problem(info={"messages": given[1:]}), system="S") == given


def test_chat_template_of_a_real_tokenizer():
    tokenizer = load_tokenizer(str(shared_path("data", "tokenizers", "minimind")))
    ids = encode_prompt(problem(), tokenizer, "chat")
    text = tokenizer.decode(ids, skip_special=False)
    before, after = text.split(BASE)
    assert "user" in before and "assistant" in after
    assert tokenizer.decode(encode_prompt(problem(), tokenizer, "boxed")) == BASE


def test_system_prompt_and_thinking_switch():
    tokenizer = load_tokenizer(str(shared_path("data", "tokenizers", "qwen3")))
    asked = (encode_prompt(problem(), tokenizer, "chat", "Be brief.", x) for x in (True, False, None))
    thinking, silent, default = asked
    text = tokenizer.decode(thinking, skip_special=False)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert thinking == default and silent == thinking + tokenizer.encode("<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("template", "options", "message"),
    [
        ("{{ messages[0].content", {}, "chat template: unexpected end"),
        ("{{ messages[0].content + 1 }}", {}, "chat template: can only concatenate str"),
        ("{{ raise_exception('Conversation roles\\nmust alternate') }}", {}, "chat template: Conversation roles$"),
        ("{{ messages[0].content }}", {"enable_thinking": False}, "has no such switch"),
    ],
)
def test_broken_chat_templates_are_one_line(template, options, message):
    tokenizer = vocab_tokenizer("ab", "a", "b")
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=message) as error:
        encode_prompt(problem(), tokenizer, "chat", **options)
    assert "\n" not in str(error.value)


def test_thinking_that_the_prompt_opens_is_told_to_the_graders():
    tokenizer = load_tokenizer(str(shared_path("data", "tokenizers", "qwen3")))
    ids = encode_prompt(problem(), tokenizer, "chat")
    assert opening(ids, tokenizer) == "" == opening(encode_prompt(problem(), tokenizer, "chat", "", False), tokenizer)
    opened = opening([*ids, *tokenizer.encode("<think>\n")], tokenizer)
    texts = ["so 2", "so 3 </think> it is 2"]
    with Grader(workers=1) as grader:
        assert [g.outcome for g in grade_group([problem()] * 2, texts, grader)] == ["correct", "correct"]
        found = [g.outcome for g in grade_group([problem()] * 2, texts, grader, opening=opened)]
    assert found == ["unparsed", "correct"]


def test_bos_goes_in_front_of_plain_text():
    tokenizer = load_tokenizer(str(shared_path("data", "tokenizers", "llama2")))
    assert tokenizer.bos_id == 1
    assert encode_prompt(problem(), tokenizer, "plain") == [1, *tokenizer.encode(QUESTION)]


def test_dial():
    tokenizer = vocab_tokenizer(dial.PIECES, dial.END, dial.PAD)
    [p] = dial.problems("train", 0, 1, mode="exact")
    ids = encode_prompt(p, tokenizer, "dial")
    assert tokenizer.decode(ids) == dial.prompt_text(p) and len(ids) == p.info["n"] + 2
    _, completion = next(dial.demonstrations("full", 0, 1))
    assert tokenizer.decode([*tokenizer.encode(completion), *tokenizer.eos_ids]) == completion
    assert tokenizer.encode(dial.END) == list(tokenizer.eos_ids)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prompt_text(problem(), "fancy"), "valid: plain, boxed, chat, dial"),
        (lambda: prompt_text(problem(mode="exact"), "boxed"), "problem 'q'"),
        (lambda: prompt_text(problem(mode="about", budget=3), "boxed"), "valid: none, exact, max"),
        (
            lambda: encode_prompt(problem(), vocab_tokenizer(dial.PIECES, dial.END, dial.PAD), "chat"),
            "no chat template",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(UserError, match=message):
        call()


@pytest.mark.parametrize("switch, given", [("default", {}), ("off", {"enable_thinking": False})])
def test_qwen3_is_asked_in_training_and_generate_as_transformers_renders_it(tmp_path, switch, given):
    transformers = pytest.importorskip("transformers")
    where = str(shared_path("data", "tokenizers", "qwen3"))
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"id": "1", "problem": QUESTION, "answer": "2"}) + "\n")
    config = base_config()
    config.model.tokenizer, config.model.shape.hidden_size = where, 8
    config.task.update(
        {"name": "math", "data": str(data), "template": "chat", "system_prompt": "Think.", "enable_thinking": switch}
    )
    validate(config)
    tokenizer = load_tokenizer(where)
    with open_task(config, tokenizer) as task:
        ids = task.encode(task.train[0])
    oracle = transformers.AutoTokenizer.from_pretrained(where)
    chat = [{"role": "system", "content": "Think."}, {"role": "user", "content": QUESTION + BOXED}]
    text = oracle.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **given)
    assert tokenizer.decode(ids, skip_special=False) == text
    assert ids == oracle(text, add_special_tokens=False)["input_ids"]
    assert text.endswith("<think>\n\n</think>\n\n") == (switch == "off")
    asked = generate.encode(tokenizer, QUESTION + BOXED, True, **prompt_options(config.task))
    assert asked.tolist() == ids
