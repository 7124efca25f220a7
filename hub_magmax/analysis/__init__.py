"""Comparison, sweep, search and diagnosis: many merges, to choose one."""
