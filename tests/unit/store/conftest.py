"""What several tests of the store read."""

from __future__ import annotations

import pytest

from tests.support.signed_cache import MadePath, make_path


@pytest.fixture(scope="session")
def big() -> MadePath:
    """A path with a file of more than is fetched at once, and of a size that is no multiple of anything."""
    return make_path("big", 6_000_001)
