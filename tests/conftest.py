"""What all tests share."""

import hypothesis
import pytest

# A busy machine makes an example slow, not wrong; what must be fast has a benchmark.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")


@pytest.fixture
def anyio_backend() -> str:
    """Run async tests on asyncio: a store belongs to its event loop."""
    return "asyncio"
