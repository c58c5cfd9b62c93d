"""What is refused before Meta Lingua's loop begins, as far as no checkout is needed to see it."""

import pytest

from apps.topk import lingua_host
from lingua_topk.errors import ConfigError


@pytest.mark.parametrize("loss", ["torch", "liger", "cce"])
def test_a_loss_that_only_the_embedded_host_has_is_refused(loss, monkeypatch):
    monkeypatch.setenv("LINGUA_TOPK_LOSS", loss)
    with pytest.raises(ConfigError, match=f"LINGUA_TOPK_LOSS={loss}: Meta Lingua has its own"):
        lingua_host._validate_loss()


@pytest.mark.parametrize("loss", ["", "auto", "plain"])
def test_its_own_loss_may_be_named(loss, monkeypatch):
    monkeypatch.setenv("LINGUA_TOPK_LOSS", loss)
    lingua_host._validate_loss()
