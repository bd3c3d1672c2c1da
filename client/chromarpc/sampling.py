"""What images are sampled with where nobody says, which is all that older servers have."""

from __future__ import annotations

from typing import Final

FLOWMATCH: Final = "flowmatch"
"""The reference's sampler, and its schedule."""
REFERENCE: Final = "reference"
"""The settings that follow the reference, and no other program."""
