"""Numbers as people read them."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return ``text`` with its unprintable characters escaped.

    These are control characters, which a terminal would obey, line ends, and lone surrogates, which can't be written
    to a file.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" if ord(c) < 256 else f"\\u{ord(c):04x}" for c in text)


def bytes_text(value: float) -> str:
    """``value`` bytes with a decimal unit: "1.57 GB"."""
    for unit in ("B", "KB", "MB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def seconds_text(value: float) -> str:
    """``value`` seconds: "38 ms", "4.7 s", "12 min 5 s", "3 h 2 min"."""
    if value < 1:
        return f"{1000 * value:.0f} ms"
    if value < 60:
        return f"{value:.2f} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    return f"{minutes // 60} h {minutes % 60} min"
