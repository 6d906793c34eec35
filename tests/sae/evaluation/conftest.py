"""One trained model and dictionary for all evaluations."""

from __future__ import annotations

import pytest

from tests.sae.evaluation.trained_host import Host, train_host


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    return train_host(tmp_path_factory.mktemp("host"))
