"""Models in use: verified, rebuilt, signed, watched, rolled back."""
