"""Checkpoints beside the base model: what differs between them, and the rules that settle it."""
