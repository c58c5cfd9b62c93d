"""Measurements of the programs, each a program of its own: `python -m apps.bench.NAME`."""
