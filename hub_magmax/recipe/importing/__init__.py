"""Configurations of other tools, read line by line and written as recipes."""
