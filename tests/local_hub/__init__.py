"""Fakes of the outside world, for tests and for trying things without an account."""
