"""A small disk, for root alone; a run of a few steps to harm; what must come out of it."""

import os
import subprocess

import pytest

from tests.apps.tiny import write_corpus


class SmallDisk:
    """A file system of its own at `path`, with room for `size` bytes."""

    def __init__(self, path, size):
        self.path, self.size = path, size
        self._ballast = path / ".ballast"

    def fill(self, left):
        """Leave room for that many bytes, in whole pages."""
        self.free()
        rest = os.statvfs(self.path)
        n = rest.f_bavail * rest.f_bsize - left
        assert n >= 0, f"there is no room for {left} bytes as it is"
        with open(self._ballast, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(n, 1))

    def free(self):
        """Give the room back."""
        self._ballast.unlink(missing_ok=True)


@pytest.fixture
def small_disk(tmp_path):
    """Call it with a size in bytes for a `SmallDisk`."""
    if os.geteuid() != 0:
        pytest.skip("a full disk is a small tmpfs that root mounts: run the tests as root")
    mounted = []

    def mount(size):
        path = tmp_path / f"disk{len(mounted)}"
        path.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here ({done.stderr.strip()}): as root, with"
                        " the capability SYS_ADMIN, it can")  # fmt: skip
        mounted.append(path)
        return SmallDisk(path, size)

    yield mount
    for path in mounted:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))
