"""Every test makes its models and batches on the device of `--device`."""

import pytest

from fastminima.capture.session import fused


@pytest.fixture(autouse=True)
def _placed(placed):
    """See `placed`."""


@pytest.fixture
def fusions(monkeypatch):
    """The names that each backward pass fused."""
    seen = []

    def spying(*args, **options):
        fusion = fused.find_fusion(*args, **options)
        seen.append(set() if fusion is None else set(fusion.names))
        return fusion

    monkeypatch.setattr("fastminima.capture.session.attach.find_fusion", spying)
    return seen
