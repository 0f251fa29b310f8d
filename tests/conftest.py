import pytest
import torch

from timm_awm.layers import set_fused_merge

torch.set_num_threads(1)  # the tests run side by side, and their networks are small


@pytest.fixture
def unfused():
    """The plain formula of the merges, which is exact where the fused one rounds."""
    set_fused_merge(False)
    yield
    set_fused_merge(True)
