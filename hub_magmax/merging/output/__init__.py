"""Output folder: shards, side files, provenance and report; complete or absent."""
