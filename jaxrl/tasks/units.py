"""Units of measurement and scale words behind a number: which there are, and how they convert.

`parse("km per hour")` gives a dimension, m/s, and the factor to its base units. Words that are no unit ("apples") are
passed over, so that "5 cents per apple" still is no "5 dollars per apple". Amounts convert within a dimension (60
minutes are 1 hour). Months and years are no whole number of days, so they have a dimension of their own.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple


class Unit(NamedTuple):
    """dimension: {base unit: power} as sorted pairs. factor: how many base units one is."""

    dimension: tuple[tuple[str, int], ...]
    factor: Fraction


# Words that multiply, as powers of ten; a dozen is the exception.
POWERS = {
    "tenth": -1, "hundredth": -2, "thousandth": -3, "millionth": -6,
    "hundred": 2, "thousand": 3, "lakh": 5, "million": 6, "crore": 7, "billion": 9, "trillion": 12,
}  # fmt: skip
SCALE_WORDS = (*POWERS, "dozen")

# base unit, power of it -> "names": how many of the base. One name may be several spellings; a plural s goes without.
_TABLE: dict[tuple[str, int], dict[str, str]] = {
    ("m", 1): {
        "nm nanometer nanometre": "1/1000000000", "mm millimeter millimetre": "1/1000", "m meter metre": "1",
        "cm centimeter centimetre": "1/100", "dm decimeter decimetre": "1/10", "km kilometer kilometre": "1000",
        "in inch inches": "127/5000", "ft foot feet": "381/1250", "yd yard": "1143/1250", "mi mile": "201168/125",
    },
    ("m", 2): {"hectare ha": "10000", "acre": "316160658/78125"},
    ("m", 3): {
        "l liter litre": "1/1000", "ml milliliter millilitre cc": "1/1000000", "cl centiliter centilitre": "1/100000",
        "dl deciliter decilitre": "1/10000", "kl kiloliter kilolitre": "1", "gal gallon": "473176473/125000000000",
        "qt quart": "473176473/500000000000", "pint": "473176473/1000000000000", "cup": "473176473/2000000000000",
        "tbsp tablespoon": "473176473/32000000000000", "tsp teaspoon": "157725491/32000000000000",
    },
    ("g", 1): {
        "mg milligram milligramme": "1/1000", "g gram gramme": "1", "kg kilo kilogram kilogramme": "1000",
        "tonne": "1000000", "lb pound": "45359237/100000", "oz ounce": "45359237/1600000", "ton": "45359237/50",
    },
    ("s", 1): {
        "ms millisecond": "1/1000", "s sec second": "1", "min minute": "60", "h hr hour": "3600", "day": "86400",
        "week wk": "604800",
    },
    ("month", 1): {"month": "1", "yr year": "12", "decade": "120", "century centuries": "1200"},
    ("dollar", 1): {"cent ¢": "1/100", "dollar usd buck": "1"},
    ("euro", 1): {"euro eur €": "1"},
    ("yen", 1): {"yen ¥": "1"},
    ("degree", 1): {"degree deg": "1"},
    ("radian", 1): {"radian rad": "1"},
    ("celsius", 1): {"celsius": "1"},
    ("fahrenheit", 1): {"fahrenheit": "1"},
    ("byte", 1): {"byte": "1", "kb kilobyte": "1000", "mb megabyte": "1000000", "gb gigabyte": "1000000000"},
    ("hertz", 1): {"hz hertz": "1", "khz kilohertz": "1000", "mhz megahertz": "1000000", "ghz gigahertz": "1000000000"},
    ("joule", 1): {"joule": "1", "kj kilojoule": "1000"},
    ("watt", 1): {"watt": "1", "kw kilowatt": "1000"},
}  # fmt: skip
_UNITS = {
    name: (base, power, Fraction(factor))
    for (base, power), names in _TABLE.items()
    for spelled, factor in names.items()
    for name in spelled.split()
}
_COMPOSED = {"mph": "mile / hour", "kph": "km / hour", "kmh": "km / hour", "mpg": "mile / gallon"}
LETTERS = frozenset("mgshL")  # units of one letter that need no \text around them

# A unit as prose has it: "in" is left out ("12 in total"), and so are letters that are more often something else.
_NAMES = "|".join(sorted((re.escape(n) for n in (*_UNITS, *_COMPOSED) if len(n) > 1 and n != "in"), key=len)[::-1])
_NAME = rf"(?:(?:{_NAMES})s?|[mgshL])(?![\w])"
_POWER = r"(?:\^?[23²³]|\s+squared|\s+cubed)?"
IN_PROSE = rf"(?:(?:square|cubic|sq\.?)\s+)?(?i:{_NAME}){_POWER}(?:\s*(?:/|per)\s*(?i:{_NAME}))?"


def _entry(name: str) -> tuple[str, int, Fraction] | None:
    name = name.lower()
    return _UNITS.get(name) or _UNITS.get(name.removesuffix("s"))


def parse(text: str) -> Unit | None:
    """The unit of plain text like "km/h", "square feet", "cm^2", "cents per apple"; None if no word of it is one."""
    text = re.sub(r"\b(mph|kph|kmh|mpg)\b", lambda m: _COMPOSED[m[0]], text.lower())
    text = re.sub(r"\bdegrees?\s*(?:c\b|celsius)", "celsius", text)
    text = re.sub(r"\bdegrees?\s*(?:f\b|fahrenheit)", "fahrenheit", text)
    text = re.sub(r"\b(square|sq\.?|cubic)\s+(\w+)", lambda m: m[2] + ("^3" if m[1] == "cubic" else "^2"), text)
    text = re.sub(r"(\w)\s+(squared|cubed)\b", lambda m: m[1] + ("^3" if m[2] == "cubed" else "^2"), text)
    dimension: dict[str, int] = {}
    factor, sign = Fraction(1), 1
    tokens = re.findall(r"/|[^\s/·]+", text)
    for token in tokens:
        if token in ("/", "per"):
            sign = -1
            continue
        match = re.fullmatch(r"(.+?)\.?(?:\^\{?([1-3])\}?|([²³]))?", token)
        found = _entry(match[1])
        if found and not (match[1] == "in" and len(tokens) > 1 and "/" not in tokens):
            base, power, size = found
            times = sign * int(match[2] or {"²": 2, "³": 3}.get(match[3], 1))
            dimension[base] = dimension.get(base, 0) + power * times
            factor *= size**times
        sign = 1
    dimension = {base: power for base, power in dimension.items() if power}
    return Unit(tuple(sorted(dimension.items())), factor) if dimension else None


def ratio(gold: str, answer: str) -> Fraction | None:
    """What turns an amount in the answer's unit into one in the reference's; None if they measure different things.

    1 where either names no unit. A plain degree may be of an angle or of a temperature.
    """
    g, a = parse(gold), parse(answer)
    if g is None or a is None:
        return Fraction(1)
    if g.dimension == a.dimension:
        return a.factor / g.factor
    kinds = {g.dimension[0][0], a.dimension[0][0]}
    return Fraction(1) if kinds in ({"degree", "celsius"}, {"degree", "fahrenheit"}) else None
