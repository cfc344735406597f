"""Checks of one value each: (name of the key, value) -> value in its proper type, or an error that says what is allowed."""

import difflib
from collections.abc import Callable, Iterable
from typing import Any

from .errors import InputError

Check = Callable[[str, Any], Any]


def fail(name: str, given: Any, allowed: str, mend: str = "") -> InputError:
    return InputError(f"{name} is {given!r}; allowed is {allowed}." + (f" {mend}" if mend else ""))


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint such as ' Did you mean x?', or the list of what is known."""
    known = list(known)
    folded = {k.lower(): k for k in known}
    close = difflib.get_close_matches(word.lower(), list(folded), n=1, cutoff=0.4)
    if close:
        return f"Did you mean {folded[close[0]]!r}?"
    return f"Known are: {', '.join(known)}." if known else "No keys are known here."


def number(
    *,
    above: float | int | None = None,
    at_least: float | int | None = None,
    at_most: float | int | None = None,
    whole: bool = False,
) -> Check:
    """Check of one finite number within its range, read as float, or as int where `whole`."""
    allowed = "a whole number" if whole else "a finite number"
    parts = [
        f"above {above:g}" if above is not None else "",
        f"at least {at_least:g}" if at_least is not None else "",
        f"at most {at_most:g}" if at_most is not None else "",
    ]
    allowed = " ".join([allowed, " and ".join(p for p in parts if p)]).strip()

    def check(name: str, value: Any) -> float | int:
        kinds = int if whole else (int, float)
        is_number = isinstance(value, kinds) and not isinstance(value, bool)
        if not is_number or not -1e300 < value < 1e300:  # false for nan too
            mend = "Write it without quotation marks." if isinstance(value, str) else ""
            raise fail(name, value, allowed, mend)
        inside = (
            (above is None or value > above)
            and (at_least is None or value >= at_least)
            and (at_most is None or value <= at_most)
        )
        if not inside:
            raise fail(name, value, allowed)
        return value if whole else float(value)

    return check


def list_of(check_one: Check, length: int | None = None) -> Check:
    """Check of a list, element by element, read as a tuple."""

    def check(name: str, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)) or len(value) == 0:
            raise fail(name, value, "a list [a, b, ...]")
        if length is not None and len(value) != length:
            raise fail(name, list(value), f"a list of {length} values")
        return tuple(check_one(f"{name}[{i}]", v) for i, v in enumerate(value))

    return check


def one_or_list(check_one: Check) -> Check:
    """Check of a single value or a list of such values."""

    def check(name: str, value: Any) -> Any:
        many = isinstance(value, (list, tuple))
        return list_of(check_one)(name, value) if many else check_one(name, value)

    return check


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise fail(name, value, "true or false", "Write it without quotation marks.")
    return value


def text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise fail(name, value, "a text in quotation marks")
    return value


def choice(options: Iterable[str]) -> Check:
    options = tuple(options)

    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in options:
            allowed = "one of " + ", ".join(repr(option) for option in options)
            hint = nearest(value, options) if isinstance(value, str) else ""
            raise fail(name, value, allowed, hint if hint.startswith("Did") else "")
        return value

    return check


def choices(options: Iterable[str]) -> Check:
    """Check of a list of distinct names; an empty list is fine."""
    one = choice(options)

    def check(name: str, value: Any) -> tuple[str, ...]:
        if isinstance(value, (list, tuple)) and len(value) == 0:
            return ()
        names = list_of(one)(name, value)
        if len(set(names)) != len(names):
            raise fail(name, list(names), "a list in which every name appears once")
        return names

    return check


def chemical_symbol(name: str, value: Any) -> str:
    from ase.data import chemical_symbols

    symbols = chemical_symbols[1:104]
    if not isinstance(value, str) or value not in symbols:
        hint = ""
        if isinstance(value, str) and value.strip().capitalize() in symbols:
            hint = f"Did you mean {value.strip().capitalize()!r}?"
        raise fail(name, value, "a chemical symbol from 'H' to 'Lr', such as 'Au'", hint)
    return value


positive = number(above=0.0)
not_negative = number(at_least=0.0)
angle = number(above=0.0, at_most=1000.0)
