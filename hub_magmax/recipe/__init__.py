"""Recipes as people write them, and the lock that pins their inputs."""
