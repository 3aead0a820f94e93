"""Names that others chose, and large numbers, as people read them: for a terminal, a page, a message."""


def printable(text: str) -> str:
    """The text with all that is not printable (controls, escapes, bidi marks, newlines) spelled as \\x1b or \\u202e."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def bytes_text(count: int | None) -> str:
    """A count of bytes in at most six characters: 999B, 1.2kB, 34MB (powers of ten); - for unknown."""
    if count is None:
        return "-"
    units = ["B", "kB", "MB", "GB", "TB", "PB", "EB"]
    value, power = float(count), 0
    while value >= 999.5:
        value, power = value / 1000, power + 1
    unit = units[power]
    return f"{value:.0f}{unit}" if unit == "B" or value >= 9.95 else f"{value:.1f}{unit}"


def time_text(microseconds: int | None) -> str:
    """A duration in at most six characters: 85µs, 1.2ms, 34s, 12m, 1.5h (up to eleven years); - for unknown."""
    if microseconds is None:
        return "-"
    for limit, unit, scale in ((1e3, "µs", 1), (1e6, "ms", 1e3), (6e7, "s", 1e6), (3.6e9, "m", 6e7)):
        if microseconds < limit:
            value = microseconds / scale
            return f"{value:.0f}{unit}" if scale == 1 or value >= 9.95 else f"{value:.1f}{unit}"
    hours = microseconds / 3.6e9
    return f"{hours:.0f}h" if hours >= 9.95 else f"{hours:.1f}h"
