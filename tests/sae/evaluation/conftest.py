"""One trained model and SAE for all evaluations, and an encoder of random weights."""

from __future__ import annotations

import pytest

from tests.sae.evaluation.tiny_encoder import Encoder, make_encoder
from tests.sae.evaluation.trained_host import Host, train_host


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    return train_host(tmp_path_factory.mktemp("host"))


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return make_encoder(tmp_path_factory.mktemp("encoder"))
