"""Numbers in sentences."""


def percent(share: float) -> str:
    """A share, such as 12.3 %."""
    return f"{100 * share:.1f} %"


def number(value: float) -> str:
    """A number of any size, without an exponent where it is above 1000."""
    return f"{value:.0f}" if 1000 <= value < 1e9 else f"{value:.3g}"
