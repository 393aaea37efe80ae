"""Every test makes its models and batches on the device of `--device`."""

import pytest


@pytest.fixture(autouse=True)
def _placed(placed):
    """See `placed`."""
