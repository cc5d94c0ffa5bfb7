"""Every constant of every method takes its default, and no value of another kind."""

import math

import numpy as np
import pytest

from jaxrl.algorithms.advantages import ADVANTAGES
from jaxrl.algorithms.correction import CORRECTIONS
from jaxrl.algorithms.hyper import Choice, Flag, Integer, Number, resolve
from jaxrl.algorithms.length import LENGTH_REWARDS
from jaxrl.algorithms.losses import LOSSES
from jaxrl.algorithms.selection import SELECTIONS

TABLES = dict(
    loss=LOSSES, advantage=ADVANTAGES, selection=SELECTIONS, correction=CORRECTIONS, length_reward=LENGTH_REWARDS
)
WRONG = (math.nan, math.inf, -math.inf, -1, "", "linaer", None, (), 0.5j)


@pytest.mark.parametrize("kind", TABLES)
def test_constants_refuse_what_they_cannot_be(kind):
    table = TABLES[kind]
    for name, entry in table.items():
        assert resolve(table, kind, name)[1] == entry.defaults
        for key, constant in entry.constants.items():
            extra = () if isinstance(constant, Flag) else (True,)
            extra += () if isinstance(constant, Number) else (0.5,)
            for value in WRONG + extra:
                with pytest.raises(ValueError, match=f"^{kind} {name!r}: {key}=.* must be {constant}$"):
                    resolve(table, kind, name, {key: value})


def test_ends_of_ranges():
    assert Number(0.5, 0, 1).accepts(0) and Number(0.5, 0, 1).accepts(1) and not Number(0.5, 0, 1).accepts(1.01)
    assert not Number(0.5, 0, 1, above=True).accepts(0) and not Number(0.5, 0, 1, below=True).accepts(1)
    assert Number(3.0, 1, above=True, off=0.0).accepts(0) and not Number(3.0, 1, above=True, off=0.0).accepts(0.5)
    assert Number(1.0).accepts(np.float32(2)) and Number(1.0).accepts(np.int64(2)) and Integer(1).accepts(np.int64(2))
    assert Integer(-1, 1, 8, off=-1).accepts(-1) and not Integer(-1, 1, 8, off=-1).accepts(9)
    assert not Integer(1).accepts(np.bool_(True)) and not Integer(1).accepts(2.0)
    assert str(Number(3.0, 1, above=True, off=0.0)) == "a number above 1, or 0"
    assert str(Number(0.5, 0, 1, below=True)) == "a number of at least 0 and below 1"
    assert str(Number(0.5, -math.inf)) == "a finite number"
    assert str(Integer(1, 1, 8)) == "an integer of at least 1 and at most 8"
    assert str(Choice("", ("", "a"))) == 'one of "", a'


def test_ordered_constants():
    for table, kind, name, values in (
        (LOSSES, "loss", "bapo", {"low": 0.95}),
        (LOSSES, "loss", "maspo", {"risk_low": 20.0}),
        (CORRECTIONS, "correction", "icepop", {"low": 6.0}),
        (SELECTIONS, "selection", "lspo_value", {"max": 0.5}),
    ):
        with pytest.raises(ValueError, match=f"^{kind} '{name}': .* must not be above "):
            resolve(table, kind, name, values)
