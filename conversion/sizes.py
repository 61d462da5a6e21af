"""Sizes as people read them."""

from __future__ import annotations

_UNITS = ("kB", "MB", "GB", "TB")


def shown_bytes(num_bytes: float) -> str:
    """In the unit that leaves one to three digits before the point: 812 bytes, 5.8 MB, 140 GB."""
    if num_bytes < 999.5:
        return f"{num_bytes:.0f} bytes"
    size = num_bytes / 1000
    for unit in _UNITS:
        if size < 999.5 or unit == _UNITS[-1]:
            break
        size /= 1000
    return f"{size:.1f} {unit}" if size < 99.95 else f"{size:,.0f} {unit}"


def shown_speed(num_bytes: float, seconds: float) -> str:
    return f"{shown_bytes(num_bytes / max(seconds, 1e-9))}/s"
