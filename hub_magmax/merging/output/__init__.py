"""The output folder: complete or absent."""
