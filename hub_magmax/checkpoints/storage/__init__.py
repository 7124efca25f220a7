"""Bytes of checkpoints: folders of this machine, and the Hub."""
