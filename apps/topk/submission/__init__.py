"""Runs as jobs of SLURM: one, or a sweep of them with an evaluation behind each."""
