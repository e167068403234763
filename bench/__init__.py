"""Benchmarks: what runs how fast in how much memory, measured on this device or modelled, and saying which."""
