"""The package k2 for the other files of this room; where it does not load, the error says why and which one would."""

from __future__ import annotations

from k2ssl.lattice.wheel import wheel_that_fits

try:
    import k2
except Exception as error:  # a wheel for another torch fails in ways of its own
    why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    raise ImportError(f"k2 does not load: {why}; {wheel_that_fits()}") from error

__all__ = ["k2"]
