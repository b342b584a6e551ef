"""Numbers and verdicts as a reader sees them: percentages, points, p-values, perplexities, durations."""

from __future__ import annotations

import math

from raymerge.schemas import Row

#: What stands where there is no value.
NONE = "–"


def finite(number: float | None) -> float | None:
    """A number that can be drawn, or None."""
    return number if number is not None and math.isfinite(number) else None


def percent(share: float | None, digits: int = 1, *, limits: tuple[float | None, float | None] = (None, None)) -> str:
    """A share in [0, 1] as a percentage, with its interval where there is one."""
    text = NONE if share is None or not math.isfinite(share) else f"{100 * share:.{digits}f} %"
    return f"{text} {interval(*limits)}".rstrip()


def interval(low: float | None, high: float | None) -> str:
    """The interval of a share, in per cent, without the unit; "" where there is none."""
    return "" if low is None or high is None else f"[{100 * low:.1f}, {100 * high:.1f}]"


def points(difference: float | None) -> str:
    """A difference of shares in percentage points, with its sign."""
    return NONE if difference is None else signed(100 * difference, 1)


def signed(number: float, digits: int) -> str:
    """A number with a sign; a minus as long as a plus, none before zero. A limit may be infinite: of one question."""
    if math.isinf(number):
        return "+∞" if number > 0 else "−∞"
    text = f"{abs(number):.{digits}f}"
    return text if float(text) == 0 else f"{'+' if number > 0 else '−'}{text}"


def perplexity(number: float | None, limits: tuple[float | None, float | None] = (None, None)) -> str:
    """Three digits that say something, whole numbers from 100 on, powers of ten from a million on; with the interval
    where there is one."""
    if number is None or math.isnan(number):
        return NONE
    text = f"{number:,.{2 if number < 10 else 1 if number < 100 else 0}f}" if number < 1e6 else f"{number:.1e}"
    text = "∞" if math.isinf(number) else text
    return text if None in limits else f"{text} [{perplexity(limits[0])}, {perplexity(limits[1])}]"


def difference(row: Row) -> str:
    """A row of `comparisons` with its interval: accuracies in percentage points, others in nats."""
    if row["measure"] != "accuracy":
        return f"{signed(row['difference'], 3)} [{signed(row['ci_low'], 3)}, {signed(row['ci_high'], 3)}]"
    return f"{points(row['difference'])} [{points(row['ci_low'])}, {points(row['ci_high'])}]"


def p_value(p: float | None) -> str:
    """Two significant digits; what is below 0.001 only says so, and so does what rounding would lift to 0.05, beside a
    verdict that it is below."""
    if p is not None and p < 0.05 <= round(p, 3):
        return "< 0.05"
    return NONE if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def value(number: float | None, digits: int = 3) -> str:
    """A number of no unit, with a proper minus."""
    if number is None or not math.isfinite(number):
        return NONE
    return f"{number:,.{digits}f}".replace("-", "−")


def count(number: int) -> str:
    """A whole number, thousands set apart."""
    return f"{number:,}"


def plural(number: int, noun: str) -> str:
    """A count with its noun."""
    return f"{count(number)} {noun}" + ("" if number == 1 else "s")


def millions(number: int) -> str:
    """A number of parameters."""
    if number >= 1e9:
        return f"{number / 1e9:.2f} billion"
    return f"{number / 1e6:.0f} million" if number >= 1e7 else f"{number / 1e6:.2f} million"


def duration(seconds: float) -> str:
    """A time in the largest units that say something."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def enumerated(words: list[str]) -> str:
    """Words as a sentence has them: "a, b and c"; of many, as `listed`."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first and len(words) <= 8 else listed(words)


def listed(words: list[str], most: int = 8) -> str:
    """Words in a row, the number of those left out at the end."""
    words = list(words)
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")
