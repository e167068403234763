"""Faults put into training and preparing on purpose, and what came of each: `python -m bench.faults`.

A module a row of the table; each draws its injections from a seed. The run that nothing happened to is the judge.
"""
