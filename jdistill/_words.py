"""Numbers and names as people read them, the same in the terminal, the page, and the figures."""

import math
from collections.abc import Sequence

_NORMS = {"linf": "l∞"}


def norm_name(norm: str) -> str:
    """The norm as readers know it."""
    return _NORMS.get(norm, norm)


def eps_text(eps: float) -> str:
    """A radius in few digits, as a fraction of 255 where that is what was meant.

    >>> eps_text(0.1), eps_text(8 / 255), eps_text(1.0), eps_text(0.031)
    ('0.1', '8/255', '1', '0.031')
    """
    levels = eps * 255
    if len(f"{eps:.5g}") > 6 and 0 < levels < 255 and abs(levels - round(levels)) < 1e-3:
        return f"{round(levels)}/255"
    return f"{eps:.4g}"


def within(norm: str, eps: float) -> str:
    """A radius in a norm.

    >>> within("linf", 8 / 255)
    'l∞ ≤ 8/255'
    """
    return f"{norm_name(norm)} ≤ {eps_text(eps)}"


def percent(share: float, digits: int = 1) -> str:
    """A share as percent; 0% and 100% only when it is exactly that.

    >>> percent(1.0), percent(0.9999), percent(0.0301), percent(0.0), percent(1e-6)
    ('100%', '>99.9%', '3.0%', '0%', '<0.1%')
    """
    if not math.isfinite(share):
        return "–"
    if share in (0.0, 1.0):
        return f"{100 * share:.0f}%"
    text, step = f"{100 * share:.{digits}f}", 10.0**-digits
    if float(text) == 0:
        return f"<{step:.{digits}f}%"
    if float(text) == 100:
        return f">{100 - step:.{digits}f}%"
    return f"{text}%"


def points(difference: float, digits: int = 1) -> str:
    """A difference of shares in percentage points, with its sign.

    >>> points(0.002), points(-0.258), points(0.0), points(0.00001)
    ('+0.2', '−25.8', '0', '+0.0')
    """
    if not math.isfinite(difference):
        return "–"
    sign = "" if difference == 0 else "+" if difference > 0 else "−"
    return f"{sign}{abs(100 * difference):.{digits if difference else 0}f}"


def p_value(value: float) -> str:
    """A p-value as papers print it.

    >>> p_value(0.4), p_value(0.0231), p_value(2e-7)
    ('0.4', '0.023', '< 0.001')
    """
    return "< 0.001" if value < 0.001 else f"{value:.2g}"


def number(value: float, digits: int = 3) -> str:
    """A number in few significant digits, without an exponent where it stays readable.

    >>> number(482.3), number(1.8249), number(12345.6), number(0.00001234), number(-38.25)
    ('482', '1.82', '12,300', '1.23e-05', '−38.2')
    """
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    text = f"{value:.{digits - 1}e}"
    if value == 0:
        text = "0"
    elif 1e-3 <= size < 1e7:
        decimals = digits - 1 - math.floor(math.log10(size))
        text = f"{round(value, decimals):,.{max(decimals, 0)}f}"
    return text.replace("-", "−", 1) if value < 0 else text


def decimals(value: float) -> str:
    """A number with two decimals, for columns that are read against each other.

    >>> decimals(1.8249), decimals(-38.2)
    ('1.82', '−38.20')
    """
    if not math.isfinite(value) or abs(value) >= 1e6:
        return number(value)
    return f"{value:.2f}".replace("-", "−")


def temperature(value: float) -> str:
    """A temperature, in at most three digits that say something.

    >>> temperature(30.0), temperature(2.5), temperature(482.34), temperature(1000.0)
    ('30', '2.5', '482', '1000')
    """
    return f"{float(f'{value:.3g}'):g}"


def count(amount: float, noun: str) -> str:
    """A count with its noun.

    >>> count(1, "assistant"), count(10000, "example"), count(0, "assistant")
    ('1 assistant', '10,000 examples', 'no assistants')
    """
    return f"{'no' if amount == 0 else f'{amount:,}'} {noun}{'' if amount == 1 else 's'}"


def join(items: Sequence[str]) -> str:
    """Items as a sentence lists them.

    >>> join(["a"]), join(["a", "b"]), join(["a", "b", "c"])
    ('a', 'a and b', 'a, b, and c')
    """
    if len(items) < 3:
        return " and ".join(items)
    return f"{', '.join(items[:-1])}, and {items[-1]}"


def line_name(generation: int) -> str:
    """A chain length, as a legend names it."""
    if generation == 0:
        return "teacher"
    if generation == 1:
        return "student, no assistant"
    return f"student, {count(generation - 1, 'assistant')}"
