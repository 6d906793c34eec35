"""One trained model for all tests of interpretability."""

from __future__ import annotations

import pytest

from tests.interp.domains import Trained, train_domains


@pytest.fixture(scope="session")
def domains() -> Trained:
    return train_domains()
