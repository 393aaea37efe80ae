"""Where these tests run."""

import pytest
import torch


@pytest.fixture(scope="session")
def device(request):
    return torch.device(request.config.getoption("--device", "cpu"))
