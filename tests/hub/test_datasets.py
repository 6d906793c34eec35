"""Data sets by their hub ids: which files are meant, fetched when their turn comes, and the refusals."""

from __future__ import annotations

import json
from itertools import islice

import pytest
from huggingface_hub import constants

from mergelab.errors import CorpusError
from mergelab.sae.training.config import DataSection
from mergelab.sae.training.inputs import fingerprint, input_paths
from mergelab.text.corpus import documents
from mergelab.text.corpus_files import corpus_files
from tests.hub_server import HubServer, Repository


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.fixture
def data(hub: HubServer) -> HubServer:
    files = {
        "README.md": b"# data",
        "script.py": b"raise SystemExit",
        "dataset_infos.json": b"{}",
        "data/train-00000-of-00002.jsonl": lines("a", "b"),
        "data/train-00001-of-00002.jsonl": lines("c"),
        "data/test-00000-of-00001.jsonl": lines("t"),
    }
    hub.repositories["org/data"] = Repository()
    hub.repositories["org/data"].commit(files)
    several = {"en/0.jsonl": lines("e"), "de/0.jsonl": lines("d"), "de/1.jsonl": lines("f")}
    hub.repositories["org/several"] = Repository()
    hub.repositories["org/several"].commit(several)
    return hub


def texts(place: str) -> list[str]:
    return ["".join(document.pieces) for document in documents(place)]


def test_the_split_that_trains_is_read_file_by_file(data: HubServer) -> None:
    first = [one.place for one in islice(documents("org/data"), 2)]
    assert [place.rpartition("/")[2] for place in first] == [
        f"train-00000-of-00002.jsonl: record {number}" for number in (1, 2)
    ]
    assert data.fetched() == ["data/train-00000-of-00002.jsonl"]
    assert texts("org/data") == ["a", "b", "c"]
    assert texts("org/data@main:data/test-00000-of-00001.jsonl") == ["t"]
    assert texts("org/data:data/*-00000-*") == ["t", "a", "b"]
    assert texts("org/several:de") == ["d", "f"]
    assert not [name for name in data.fetched() if name.endswith((".py", ".md"))]


def test_what_is_not_clear_is_asked_for(data: HubServer) -> None:
    for place, words in {
        "org/several": "org/several holds data in de, en; name one, as in org/several:de",
        "org/several:fr": "the data set has no 'fr'; its folders are de, en",
        "org/data:nothing*": "no file of the data set matches 'nothing",
        "org/none": "does not exist on this machine, and the hub has no data set 'org/none'",
        "org/data@v2": "has no revision 'v2'",
    }.items():
        with pytest.raises(CorpusError, match=words):
            corpus_files(place)


def test_a_training_knows_its_data_set_by_the_commit(data: HubServer) -> None:
    section = DataSection(kind="model", text="org/data")
    before = fingerprint(section)
    assert len(before) == 2 and input_paths(section) == [] and data.fetched() == []
    data.repositories["org/data"].commit({"data/train-00000-of-00001.jsonl": lines("other")})
    assert not set(fingerprint(section)) & set(before)


def test_without_a_network_the_copy_is_read(data: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert texts("org/data") == ["a", "b", "c"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert texts("org/data") == ["a", "b", "c"]
    with pytest.raises(CorpusError, match=r"HF_HUB_OFFLINE is set .*fetch the data set first"):
        texts("org/several:de")
