import pytest
import torch

from timm_awm.layers import fused, set_fused_merge

torch.set_num_threads(1)  # the tests run side by side, and their networks are small


@pytest.fixture(autouse=True)
def keep_switch(monkeypatch):
    """A test may switch the fused merges."""
    monkeypatch.setattr(fused, '_enabled', fused._enabled)
    monkeypatch.setattr(fused, '_experimental', fused._experimental)


@pytest.fixture
def unfused():
    """The plain formula of the merges, which is exact where the fused one rounds."""
    set_fused_merge(False)
