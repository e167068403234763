"""Faults put into training and preparing on purpose, and what came of each: `python -m bench.faults`.

Each module is a row of the table and draws its faults from a seed. What survives ends with the bits of an undisturbed
run.
"""
