"""The exact solver of top-n."""
