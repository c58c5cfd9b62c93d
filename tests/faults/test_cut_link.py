"""The network between two hosts is cut while they train together, and mended again."""

from contextlib import ExitStack

import pytest

from tests import processes
from tests.apps.tiny import write_config, write_corpus
from tests.faults.killed_ranks import LINE
from tests.faults.namespaces import two_hosts
from tests.faults.torchruns import LATEST, Torchrun, outcome

STEPS, TIMEOUT, PORT = 60, 10, 29411


def start(link, which, folder, words):
    """The torchrun of one host; the first holds the rendezvous."""
    host = link.hosts[which]
    torchrun = [
        "--nnodes", 2, "--nproc-per-node", 1, "--rdzv-id", "cut", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", f"{link.hosts[0].address}:{PORT}", "--local-addr", host.address,
        "--rdzv-conf", f"is_host={1 - which}", "-m",
    ]  # fmt: skip
    return Torchrun(
        folder / str(which), [*torchrun, *words], host.before,
        GLOO_SOCKET_IFNAME=host.device, LINGUA_TOPK_TIMEOUT=str(TIMEOUT),
    )  # fmt: skip


@pytest.mark.long
def test_both_sides_end_and_go_on_once_the_link_is_back(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    config = write_config(tmp_path / "config.yaml")

    def words(name):
        return ["apps.topk.train", f"config={config}", f"data.root_dir={corpus}",
                f"dump_dir={tmp_path / name}", f"steps={STEPS}", "checkpoint.dump.every=5",
                "checkpoint.dump.keep=2"]  # fmt: skip

    done = processes.run(2, *words("whole"))
    assert done.returncode == 0, done.stderr[-4000:]
    with two_hosts() as link:
        with ExitStack() as stack:
            both = [
                stack.enter_context(start(link, i, tmp_path / "first", words("cut")))
                for i in range(2)
            ]
            both[0].wait_for("step: 22 ")
            link.cut()
            for one in both:
                assert one.process.wait(timeout=LATEST) == 1
                (said,) = one.errors
                assert said.startswith(LINE)
        saved = [path.name for path in (tmp_path / "cut/checkpoints").glob("[0-9]*")]
        assert "0000000020" in saved and f"{STEPS:010d}" not in saved
        link.mend()
        with ExitStack() as stack:
            both = [
                stack.enter_context(start(link, i, tmp_path / "second", words("cut")))
                for i in range(2)
            ]
            for one in both:
                assert one.process.wait(timeout=LATEST) == 0, one.err[-4000:]
                assert "resuming from" in one.out
    assert outcome(tmp_path / "cut", STEPS) == outcome(tmp_path / "whole", STEPS)
