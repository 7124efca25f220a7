"""How numba compiles the functions of compiled loops.

Other threads run meanwhile, and a division by zero raises nothing. Nothing is allocated, so nothing needs to
be counted: numba counts who uses an array, even for a call or a row of it, and that took half of the time of
functions on sixteen elements.
"""

from __future__ import annotations

from typing import Any

from numba import njit

_njit: Any = njit

compiled: Any = _njit(nogil=True, error_model="numpy", _nrt=False)
#: For what works on sixteen elements, because a call would take longer than that.
inlined: Any = _njit(nogil=True, error_model="numpy", _nrt=False, forceinline=True)
