"""What the tests of the judge begin with."""

from __future__ import annotations

import pytest

from tests.faults.history.hand_made import Made


@pytest.fixture
def made() -> Made:
    """A history without calls."""
    return Made()
