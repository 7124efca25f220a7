"""The config.json of an output, made to describe its weights."""
