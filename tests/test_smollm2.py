"""The recipes for a real small model are valid before a model is there to try them on."""

import pytest

from configs.smollm2 import RECIPES, get_config
from jaxrl.runtime.config import validate


@pytest.mark.parametrize("recipe", [*RECIPES, "grpo,gpu"])
def test_recipes_are_valid(recipe, tmp_path):
    config = get_config(recipe)
    config.model.path = str(tmp_path)
    validate(config)


def test_unknown_recipes_are_named():
    with pytest.raises(ValueError, match="choose one of warm, grpo"):
        get_config("ppo")
