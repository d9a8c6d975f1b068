"""Numbers as people read them."""

from __future__ import annotations


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
