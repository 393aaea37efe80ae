"""What every test runs under."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _deterministic():
    """Fill what `torch.empty` returns with NaN: a forgotten tile cannot pass."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
