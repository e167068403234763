"""A run in its folder: what it begins with and goes on from, what it keeps and what it shows."""
