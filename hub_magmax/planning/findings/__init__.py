"""Oddities of checkpoints: by their configurations, and by samples of their values."""
