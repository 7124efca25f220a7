"""A folder pushed to the Hub."""
