"""A real SLURM for the tests of this folder; each worker of pytest-xdist has its own."""

import os

import pytest

from tests.cluster import slurm


@pytest.fixture(scope="session")
def cluster():
    """A running `tests.cluster.slurm.Cluster`; skips where there can be none."""
    if slurm.missing():
        pytest.skip(f"SLURM: {slurm.missing()}")
    with slurm.running() as running:
        yield running


@pytest.fixture
def in_cluster(cluster, monkeypatch):
    """The cluster, and what this process starts uses it too."""
    for name in [name for name in os.environ if name.startswith(("SLURM", "SBATCH"))]:
        monkeypatch.delenv(name)
    for name, value in cluster.environment().items():
        monkeypatch.setenv(name, value)
    return cluster
