"""Every mistake in a configuration is one line that names the key and what would be valid."""

import pathlib

import pytest

from jaxrl.errors import UserError
from jaxrl.runtime.config import base_config, mismatch_warning, parse_config, validate

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
        (["--config.algorithm.los=maspo"], ["los"]),
        (["--config.algorithm.loss=mapso"], ["config.algorithm.loss", "mapso", "maspo", "gspo"]),
        (["--config.algorithm.selection=accuracy+lsop"], ["config.algorithm.selection", "lsop", "lspo"]),
        (["--config.steps=many"], ["steps", "many"]),
        (["--config.steps=0"], ["config.steps", "at least 1"]),
        (["--config.batch.group_size=1"], ["config.batch.group_size", "grpo"]),
        (["--config.batch.updates=1000"], ["config.batch.updates", "256"]),
        (["--config.task.name=math"], ["config.task.data"]),
        (["--config.model.path=/no/such/model"], ["config.model.path", "/no/such/model"]),
        (["--config.length.reward=lcpo_exact"], ["config.length.mode", "exact"]),
        (["--config.sampling.top_p=0"], ["top_p"]),
        (["--config.sampling.cache=int4"], ["config.sampling.cache", "int4", "same, int8"]),
        (["--config.sampling.carry_over=8"], ["config.sampling.carry_over=8", "batch.keep_surplus=True"]),
        (["--config.sampling.temperature=0"], ["config.sampling.temperature"]),
        (["--config.batch.row_tokens=8"], ["config.batch.row_tokens=8", "sampling.max_prompt", "40"]),
        (["--config.seed=4294967296"], ["config.seed", "2**32"]),
        (["--config.model.sampler_dtype=float8"], ["config.model.sampler_dtype", "bfloat16"]),
        *(
            ([f"--config.{key}={value}"], [f"config.{key}={value} must be at least {value + 1}"])
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
    with pytest.raises(UserError, match="config.algorithm.clipping"):
        validate(config)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_parse(path):
    config = parse_config(["train", f"--config={path}"])
    config.model.path = config.task.data = ""  # paths of the reader's machine are checked when it runs
    assert set(config.keys()) == set(base_config().keys())
