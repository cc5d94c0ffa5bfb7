"""Every mistake in a configuration is one line that names the key and what would be valid."""

import math
import pathlib

import pytest

from jaxrl.algorithms.advantages import ADVANTAGES
from jaxrl.algorithms.hyper import Choice, Flag, Integer, Number, Words
from jaxrl.errors import UserError
from jaxrl.runtime import config as config_module
from jaxrl.runtime.config import base_config, get, mismatch_warning, parse_config, settings, validate

QUICKSTART = str(pathlib.Path(__file__).parents[2] / "configs" / "quickstart.py")
CONFIGS = [p for p in pathlib.Path(QUICKSTART).parent.glob("*.py") if p.name != "__init__.py"]


def parse(*flags):
    config = parse_config(["train", f"--config={QUICKSTART}", *flags])
    validate(config)
    return config


def test_overrides_reach_every_section():
    config = parse(
        "--config.algorithm.loss=maspo",
        "--config.algorithm.loss_hyper.maspo.sigma_base=2",
        "--config.algorithm.selection=accuracy+lspo",
        "--config.algorithm.selection_hyper.lspo.high=0.6",
        "--config.optimizer.learning_rate=1",
    )
    assert config.algorithm.loss_hyper.maspo.sigma_base == 2.0
    assert config.algorithm.selection_hyper.lspo.high == 0.6
    assert config.optimizer.learning_rate == 1.0


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--config.algorithm.los=maspo"], ["config.algorithm.los is not a setting", "config.algorithm has ", "loss,"]),
        (["--config.length.hyper.laser.alpha=1"], ["length.hyper.laser.alpha is not", "laser has bonus, target"]),
        (["--config.steps.more=1"], ["config.steps.more is not a setting; config.steps has no keys"]),
        (["--noconfig.reusme"], ["config.reusme is not a setting"]),
        (["--config.sft.modes=exact,max"], ["config.sft.modes=('exact,max',)", "('exact', 'max')"]),
        (["--config.checkpoint.keep_best=eval/acuracy"], ["config.checkpoint.keep_best", "eval/accuracy"]),
        (["--config.run_dir="], ["config.run_dir=''", "a directory"]),
        (["--config.optimizer.learning_rate=nan"], ["config.optimizer.learning_rate=nan", "at least 0"]),
        (["--config.optimizer.grad_clip=-1"], ["config.optimizer.grad_clip=-1.0"]),
        (["--config.sampling.replay"], ["config.sampling.replay=True needs sampling.top_k, top_p or min_p"]),
        (["--config.sampling.replay", "--config.sampling.top_p=0.9", "--config.algorithm.kl_coef=0.1"],
         ["config.sampling.replay=True", "algorithm.kl_coef=0.1", "reference"]),
        (["--config.optimizer.b2=1"], ["config.optimizer.b2=1.0", "below 1"]),
        (["--config.optimizer.eps=0"], ["config.optimizer.eps=0.0"]),
        (["--config.resume=flase"], ["config.resume", "flase"]),
        (
            ["--config.algorithm.selection_hyper.lspo.quantile=linaer"],
            ["config.algorithm.selection_hyper.lspo.quantile='linaer'", "linear, inf"],
        ),
        (["--config.algorithm.loss_hyper.bapo.low=0.95"], ["loss_hyper.bapo.low=0.95 must not be above low_max=0.9"]),
        (["--config.length.mode=both"], ["config.length.mode='both'", "exact or max"]),
        (["--config.length.reward=lcpo_exact", "--config.length.mode=max"], ["config.length.mode='max'", "lcpo_max"]),
        (
            ["--config.length.reward=overlong", "--config.length.hyper.overlong.cache=25"],
            ["config.length.hyper.overlong.cache=25", "24 tokens"],
        ),
        (["--config.algorithm.kl_unbiased"], ["config.algorithm.kl_unbiased=True", "algorithm.kl_coef above 0"]),
        (["--config.batch.greso_hyper.start=0.99"], ["config.batch.greso_hyper.start=0.99", "high=0.95"]),
        (["--config.algorithm.kl_in_reward"], ["config.algorithm.kl_in_reward=True", "algorithm.kl_coef"]),
        (["--config.algorithm.kl_in_reward", "--config.algorithm.kl_coef=1", "--config.algorithm.advantage=gdpo"],
         ["config.algorithm.kl_in_reward=True", "gdpo"]),
        (["--config.rewards.weights=correct"], ["config.rewards.weights='correct'", "such as correct=1,length=0.5"]),
        (["--config.rewards.weights=correct=1,tone=2"], ["config.rewards.weights", "'tone'", "task.reward"]),
        (["--config.rewards.weights=correct=1,correct=2"], ["config.rewards.weights", "'correct' more than once"]),
        (["--config.rewards.weights=length=.5"], ["config.rewards.weights", "config.length.reward is none"]),
        (
            ["--config.optimizer.schedule=cosine", "--config.optimizer.warmup_steps=120"],
            ["config.optimizer.schedule='cosine'", "update 120"],
        ),
        (["--config.mesh.fsdp=-1"], ["config.mesh", "at most one"]),
        (["--config.task.dial.n_min=9"], ["config.task.dial.n_min=9", "task.dial.n_max=8"]),
        (["--config.length.mode=max", "--config.task.dial.max_budget=16"], ["config.task.dial.max_budget=16", "17"]),
        (["--config.sampling.max_tokens=16"], ["config.sampling.max_tokens=16", "17 tokens"]),
        (["--config.task.name=choice", "--config.task.data=a"], ["config.sft.data is empty"]),
        (["--config.task.system_prompt=Think."], ["config.task.system_prompt='Think.'", "task.template=chat"]),
        (["--config.task.enable_thinking=off"], ["config.task.enable_thinking='off'", "task.template=chat"]),
        (["--config.task.enable_thinking=False"], ["config.task.enable_thinking='False'", "default, on, off"]),
        (["--config.algorithm.loss=mapso"], ["config.algorithm.loss", "mapso", "maspo", "gspo"]),
        (["--config.algorithm.selection=accuracy+lsop"], ["config.algorithm.selection", "lsop", "lspo"]),
        (["--config.steps=many"], ["steps", "many"]),
        (["--config.steps=0"], ["config.steps=0 must be", "at least 1"]),
        (["--config.batch.group_size=1"], ["config.batch.group_size=1 must be", "at least 2"]),
        (["--config.batch.updates=1000"], ["config.batch.updates", "256"]),
        (["--config.task.name=math"], ["config.task.data"]),
        (["--config.model.path=/no/such/model"], ["config.model.path", "/no/such/model"]),
        (["--config.length.reward=lcpo_exact"], ["config.length.mode", "exact"]),
        (["--config.sampling.top_p=0"], ["config.sampling.top_p=0.0", "above 0 and at most 1"]),
        (["--config.sampling.cache=int4"], ["config.sampling.cache", "int4", "same, int8"]),
        (["--config.sampling.carry_over=8"], ["config.sampling.carry_over=8", "batch.keep_surplus=True"]),
        (["--config.sampling.temperature=0"], ["config.sampling.temperature"]),
        (["--config.batch.row_tokens=8"], ["config.batch.row_tokens=8", "sampling.max_prompt", "40"]),
        (["--config.seed=4294967296"], ["config.seed=4294967296", "at most 4294967295"]),
        (["--config.model.sampler_dtype=float8"], ["config.model.sampler_dtype", "bfloat16"]),
        *(
            ([f"--config.{key}={value}"], [f"config.{key}={value} must be an integer of at least {value + 1}"])
            for key, value in {
                "seed": -1, "eval.every": 0, "eval.samples": 0, "eval.max_tokens": -1, "checkpoint.every": 0,
                "checkpoint.keep": 0, "sft.batch": 0, "length.low": 0, "batch.generation_prompts": -1,
            }.items()
        ),  # fmt: skip
        (["stray"], ["stray"]),
    ],
)
def test_mistakes_are_one_line_naming_the_key(flags, words):
    with pytest.raises(UserError) as e:
        parse(*flags)
    message = str(e.value)
    assert "\n" not in message
    assert all(w in message for w in words), message


@pytest.mark.parametrize("keys", [(), ("weights",), ("cache",), ("weights", "cache")])
def test_a_sampler_that_rounds_is_warned_of_unless_it_is_corrected(keys):
    flags = [f"--config.sampling.{key}=int8" for key in keys]
    warning = mismatch_warning(parse(*flags))
    assert bool(warning) == bool(keys) and "\n" not in warning
    assert all(f"sampling.{key}=int8" in warning for key in keys)
    assert mismatch_warning(parse(*flags, "--config.algorithm.correction=token_tis")) == ""


def test_missing_config_file():
    with pytest.raises(UserError, match="no_such_config.py"):
        parse_config(["train", "--config=no_such_config.py"])
    with pytest.raises(UserError, match="--config is missing"):
        parse_config(["train"])


def test_a_key_that_a_file_invents_is_named():
    config = base_config()
    with config.unlocked():
        config.algorithm.clipping = 1
    with pytest.raises(UserError, match="config.algorithm.clipping is not a setting; config.algorithm has advantage, "):
        validate(config)


@pytest.mark.parametrize("body, said", [
    ("c.steps = 'many'", "broken.py:5: "),
    ("c.batch.prompts.more = 1", "broken.py:5: "),
    ("c.batch.prompts = [][0]", "broken.py:5: "),
    ("return 1 / 0", "broken.py:5: "),
])  # fmt: skip
def test_an_error_inside_a_config_file_is_one_line_with_its_place(tmp_path, body, said):
    path = tmp_path / "broken.py"
    opening = "from jaxrl.runtime.config import base_config\n\ndef get_config():\n    c = base_config()\n"
    path.write_text(f"{opening}    {body}\n")
    with pytest.raises(UserError) as e:
        parse_config(["train", f"--config={path}"])
    assert said in str(e.value) and "\n" not in str(e.value) and "Traceback" not in str(e.value)


def test_a_setting_with_a_new_name_is_told(monkeypatch):
    monkeypatch.setitem(config_module.MOVED, "optimizer.lr", "optimizer.learning_rate")
    with pytest.raises(UserError, match="config.optimizer.lr is called config.optimizer.learning_rate now"):
        parse("--config.optimizer.lr=1")


# ---- every key, every kind of wrong value

WRONG = {
    "not a number": math.nan,
    "infinite": math.inf,
    "negative": -1,
    "a fraction": 0.123,
    "a boolean": True,
    "another word": "linaer",
    "empty": "",
    "nothing": None,
    "a list": ("exact", "linaer"),
    "one word of two": ("exact,max",),
}

# What is not wrong, by kind: a Number takes fractions and a Flag booleans, of course.
TAKES = {Number: {"a fraction"}, Integer: set(), Choice: set(), Flag: {"a boolean"}, Words: set()}
# And by key: -1 where it is a choice of its own, entropies may be lowered, names and paths are any text.
TAKES_TOO = {f"mesh.{axis}": {"negative"} for axis in ("data", "fsdp", "expert", "tensor")}
TAKES_TOO |= {"algorithm.entropy_coef": {"negative"}, "model.path": {"empty"}, "model.lora.path": {"empty"}}
TAKES_TOO |= {"rewards.weights": {"empty"}}
TAKES_TOO |= {key: {"another word"} for key in (
    "run_dir", "log.wandb_project", "task.problem_field", "task.answer_field", "task.id_field",
)}  # fmt: skip
TAKES_TOO |= {key: {"another word", "empty"} for key in (
    "model.tokenizer", "task.data", "task.eval_data", "task.data_dir", "sft.data", "topology",
    "task.system_prompt",
)}  # fmt: skip
TAKES_TOO |= {key: {"empty"} for key in (
    "model.sampler_dtype", "model.products", "algorithm.aggregation", "checkpoint.keep_best", "task.reward",
)}  # fmt: skip
TAKES_TOO |= {"sampling.pages": {"negative"}}


NEEDS_MORE = {"algorithm.kl_in_reward", "algorithm.kl_unbiased", "task.system_prompt", "sampling.replay"}  # need others
CHANGED = {"model.shape.hidden_size": 8, "mesh.data": 1}


@pytest.fixture
def valid_config():
    config = base_config()
    config.update_from_flattened_dict(CHANGED)
    validate(config)
    return config


@pytest.mark.parametrize("section", sorted({key.partition(".")[0] for key in settings()}))
def test_every_key_refuses_every_wrong_kind_of_value(valid_config, section):
    for key, setting in settings().items():
        if key.partition(".")[0] != section:
            continue
        *sections, name = key.split(".")
        inner = get(valid_config, ".".join(sections)) if sections else valid_config
        for kind, value in WRONG.items():
            takes = kind in TAKES.get(type(setting), set()) | TAKES_TOO.get(key, set())
            del inner[name]  # assigning alone would convert the type
            inner[name] = value
            try:
                validate(valid_config)
            except UserError as e:
                # a fraction may be out of range, or above a constant that it must be below
                told = f"config.{key}={value!r} ", f"config.{key}={value!r}: "
                assert str(e).startswith(told) or (kind == "a fraction" and f"{name}={value!r}" in str(e)), str(e)
                assert "\n" not in str(e)
                refusals = kind == "a fraction" or key in NEEDS_MORE
                assert refusals or not takes, f"{key}: {kind} is documented as accepted, but {e}"
            else:
                assert takes, f"config.{key}={value!r} ({kind}) passes"
            del inner[name]
            inner[name] = CHANGED.get(key, setting.default)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_parse(path):
    config = parse_config(["train", f"--config={path}"])
    config.model.path = config.task.data = ""  # paths of the reader's machine are checked when it runs
    assert set(config.keys()) == set(base_config().keys())


@pytest.mark.parametrize("text, said", [
    ("from jaxrl.runtime.config import base_config\ndef get_config():\n    base_config()\n", "must return a config"),
    ("def get_config():\n    return {'seed': 1}\n", "must return a config"),
    ("from jaxrl.algorithms.losses import LOSSES, Loss\nfrom jaxrl.runtime.config import base_config\n"
     "def loss(inputs, hyper):\n    pass\nLOSSES['x'] = Loss(loss, {'k': 3.0})\n",
     r":5: .*constant 'k' is 3.0; write Number"),
])  # fmt: skip
def test_a_config_file_that_forgets_something_is_one_line(tmp_path, text, said):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"--config: .*{said}") as error:
        parse_config(["train", f"--config={path}"])
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_config_file_may_add_a_method(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from configs.quickstart import get_config\n"
                    "from jaxrl.algorithms.advantages import ADVANTAGES\nADVANTAGES['mine'] = ADVANTAGES['dr_grpo']\n")
    try:
        validate(parse_config(["train", f"--config={path}", "--config.algorithm.advantage=mine"]))
    finally:
        ADVANTAGES.pop("mine", None)


@pytest.mark.parametrize("changes, said", [
    ({"checkpoint.keep_best": "eval/pass@8"}, "needs eval.samples=8 or more"),
    ({"sampling.cache_tokens": 64, "sampling.pages": 0}, "sampling.cache_tokens=64 is the room of pages"),
    ({"length.control.target": "violations", "length.control.value": 5.0}, "length.control.value=5.0 must be a share"),
    ({"sft.modes": ([],)}, "config.sft.modes="),
])
def test_a_setting_that_would_do_nothing_is_refused(changes, said):
    config = parse("--config.length.reward=laser")
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=said):
        validate(config)
