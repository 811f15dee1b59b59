# SPDX-License-Identifier: Apache-2.0
"""What an argument may be: its type first, then its range.

A table maps names to [`Allowed`] values; `checked` holds what was given against it. Every error names the argument,
its value and what is allowed.
"""

import difflib
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple


class Allowed(NamedTuple):
    """What an argument may be: in `words` that follow "must", as a test, and as what its value becomes."""

    words: str
    holds: Callable[[Any], bool]
    becomes: Callable[[Any], Any] = lambda value: value

    def check(self, name: str, value: Any) -> Any:
        """The value as the code wants it.

        Raises:
            `ValueError`: if it is not allowed.
        """
        if not self.holds(value):
            raise ValueError(f"`{name}`={shown(value)} must {self.words}.")
        return self.becomes(value)


def checked(table: Mapping[str, Allowed], values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` as the code wants them; those whose name is not in the table stay as they are.

    >>> checked({"budget": whole(1, unit="block evaluations")}, {"budget": 24, "seed": 0})
    {'budget': 24, 'seed': 0}
    """
    return {name: table[name].check(name, value) if name in table else value for name, value in values.items()}


def check_names(
    given: Iterable[str], known: Collection[str], what: str, hints: Mapping[str, str] | None = None
) -> None:
    """Raise a `ValueError` for names that do not exist, with the nearest ones and all there are.

    Args:
        given (`Iterable[str]`): Names that were given.
        known (`Collection[str]`): Names there are.
        what (`str`): What they name, such as `"generation argument(s)"`.
        hints (`Mapping[str, str]`, *optional*): What to do instead, for names of other libraries. `None`: none.
    """
    unknown = sorted(set(given) - set(known))
    if not unknown:
        return
    advice = []
    for name in unknown:
        near = nearest(name, known)
        if name in (hints or {}):
            advice.append(f" (`{name}`: {hints[name]})")
        elif near:
            advice.append(f" (`{name}`: did you mean `{near}`?)")
    raise ValueError(f"unknown {what} {unknown}{''.join(advice)}: known are {sorted(known)}.")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The name that `name` is probably a misspelling of. `None`: none is near.

    >>> nearest("hidden_sise", ["hidden_size", "vocab_size"])
    'hidden_size'
    """
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.75)
    return found[0] if found else None


def shown(value: Any, most: int = 120) -> str:
    """`repr(value)`, cut where it is long."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # of a value that is not ours, such as a number of more digits than Python prints
        text = f"<{type(value).__name__}>"
    return text if len(text) <= most else f"{text[:most]}…"


# --- kinds of values ------------------------------------------------------------------------------------------------


def whole(least: int, most: int | None = None, unit: str = "") -> Allowed:
    """A whole number from `least` to `most`. `None`: without an end."""
    words = "be a whole number" + (f" of {unit}" if unit else "") + f", at least {least}"
    words += "" if most is None else f" and at most {most:,}"

    def holds(value: Any) -> bool:
        return is_whole(value) and least <= value and (most is None or value <= most)

    return Allowed(words, holds, int)


def number(low: float, high: float, ends: str = "[]", words: str | None = None) -> Allowed:
    """A finite number between `low` and `high`; `ends` says which of the two it may be. `words`: `None` says so."""

    def holds(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, Real):
            return False
        try:
            value = float(value)
        except OverflowError:
            return False
        above = low <= value if ends[0] == "[" else low < value
        below = value <= high if ends[1] == "]" else value < high
        return math.isfinite(value) and above and below

    return Allowed(words or f"lie in {ends[0]}{low:g}, {high:g}{ends[1]}", holds, float)


def flag() -> Allowed:
    """`True` or `False`, and not a word or number that stands for it."""
    return Allowed("be True or False", lambda value: isinstance(value, bool))


def one_of(choices: Iterable[str]) -> Allowed:
    """One of some words."""
    choices = tuple(choices)
    return Allowed(f"be one of {choices}", lambda value: isinstance(value, str) and value in choices)


def list_of(entry: Allowed, least: int, most: int) -> Allowed:
    """A list of `least` to `most` values that `entry` allows."""
    count = f"{most}" if least == most else f"at most {most:,}"

    def holds(value: Any) -> bool:
        return isinstance(value, (list, tuple)) and least <= len(value) <= most and all(map(entry.holds, value))

    words = f"be a list of {count} values that each {entry.words}"
    return Allowed(words, holds, lambda value: [entry.becomes(x) for x in value])


def either(one: Allowed, other: Allowed) -> Allowed:
    """What one of two allows."""
    return Allowed(
        f"{one.words}, or {other.words}",
        lambda value: one.holds(value) or other.holds(value),
        lambda value: one.becomes(value) if one.holds(value) else other.becomes(value),
    )


def optional(allowed: Allowed, meaning: str = "is the default") -> Allowed:
    """`None`, which has a `meaning`, or what `allowed` says."""
    return Allowed(
        f"{allowed.words}; `None` {meaning}",
        lambda value: value is None or allowed.holds(value),
        lambda value: None if value is None else allowed.becomes(value),
    )


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number: of Python or NumPy, and not `True`."""
    return isinstance(value, Integral) and not isinstance(value, bool)


# Any whole number, of Python's type afterwards.
SEED = Allowed("be a whole number", is_whole, int)


def check_whole(name: str, value: Any, minimum: int, unit: str, maximum: int | None = None) -> int:
    """`value` as an int, or a `ValueError` that names it."""
    return whole(minimum, maximum, unit).check(name, value)
