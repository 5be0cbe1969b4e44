"""Numbers as people read them; a dash is not known."""

import math


def number(value: float, digits: int = 3) -> str:
    """``value`` with ``digits`` decimals and thousands apart."""
    return "-" if math.isnan(value) else f"{value:,.{digits}f}"


def percent(value: float) -> str:
    """A share as a percentage."""
    return "-" if math.isnan(value) else f"{value:.0%}"
