"""One trained model and SAE for all evaluations, and an encoder of random weights."""

from __future__ import annotations

import pytest

from tests.sae.evaluation.tiny_encoder import Encoder, make_encoder
from tests.sae.evaluation.trained_model import SubjectModel, train_subject_model


@pytest.fixture(scope="session")
def subject(tmp_path_factory: pytest.TempPathFactory) -> SubjectModel:
    return train_subject_model(tmp_path_factory.mktemp("subject"))


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return make_encoder(tmp_path_factory.mktemp("encoder"))
