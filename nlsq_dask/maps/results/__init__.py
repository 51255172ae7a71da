"""The Dataset of a map, and what is made of it."""
