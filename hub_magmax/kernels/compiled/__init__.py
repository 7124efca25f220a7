"""The compiled backend: loops for numba, compiled once and cached."""
