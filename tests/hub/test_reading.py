"""Models by their hub ids, wherever a folder is taken: what is fetched, what is cached, and the refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from mergelab.checkpoints import open_checkpoint
from mergelab.checkpoints.hub import HubPlace, hub_origin, parse_hub_place
from mergelab.checkpoints.locations import is_url, local_path, location_text
from mergelab.checkpoints.wanted_files import wanted_files
from mergelab.errors import CheckpointError
from tests.hub_server import HubServer


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("org/name", HubPlace("org/name")),
        ("Org-1/na.me_2@main", HubPlace("Org-1/na.me_2", "main")),
        ("org/name@refs/pr/1:sub/folder/", HubPlace("org/name", "refs/pr/1", "sub/folder")),
        ("org/name:model.Q8_0.gguf", HubPlace("org/name", None, "model.Q8_0.gguf")),
    ],
)
def test_a_text_is_read_as_a_place_on_the_hub(text: str, place: HubPlace) -> None:
    assert parse_hub_place(text) == place


@pytest.mark.parametrize(
    "text",
    ["name", "/org/name", "./org/name", "../name", "a/b/c", "org/name@", "org/name:", "org/na--me",
     "org/n..m", "org/.name", "org/name:../other", "org/name:/etc/x", "org/x:a//b", "örg/name",
     "org/" + "x" * 96, "org/name.git", "gs://bucket/model", "org /name"],
)  # fmt: skip
def test_what_cannot_be_an_id_keeps_the_words_of_a_missing_path(text: str, tmp_path: Path) -> None:
    assert parse_hub_place(text) is None
    if not is_url(text):
        assert local_path(text) == Path(text)


def test_a_url_that_went_through_a_path_is_made_whole() -> None:
    assert (
        location_text(Path("gs://bucket/model")) == location_text("gs://bucket/model") == "gs://bucket/model"
    )
    assert is_url(Path("s3://bucket/a b")) and not is_url("org/name") and not is_url("C:/models/base")


FILES = [
    ".gitattributes", "README.md", "LICENSE", "config.json", "generation_config.json", "tokenizer.json",
    "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "original/consolidated.00.pth", "onnx/model.onnx", "onnx/config.json", "plot.png",
    "consolidated.safetensors", "additional_chat_templates/tool_use.jinja", "1_Pooling/config.json",
    "sub/config.json", "sub/model.safetensors",
]  # fmt: skip
INDEX = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}


def test_only_the_files_that_are_needed_are_wanted() -> None:
    small = {
        "README.md", "LICENSE", "config.json", "generation_config.json", "tokenizer.json",
        "model.safetensors.index.json", "additional_chat_templates/tool_use.jinja", "1_Pooling/config.json",
    }  # fmt: skip
    assert set(wanted_files(FILES, "", "tokenizer", "org/m", lambda name: INDEX)) == small
    shards = {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    assert set(wanted_files(FILES, "", "model", "org/m", lambda name: INDEX)) == small | shards
    assert wanted_files(FILES, "sub", "model", "org/m", lambda name: INDEX) == [
        "sub/config.json", "sub/model.safetensors",
    ]  # fmt: skip
    one = wanted_files(FILES, "consolidated.safetensors", "model", "org/m", lambda name: INDEX)
    assert set(one) == small | {"consolidated.safetensors"}


@pytest.mark.parametrize(
    ("names", "within", "words"),
    [
        (["a.gguf", "b.gguf"], "", "holds 2 weight files and no model.gguf.index.json"),
        (["config.json", "sub/config.json"], "sud", "has no file or folder 'sud' (did you mean 'sub'?)"),
    ],
)
def test_what_is_not_one_model_is_refused(names: list[str], within: str, words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        wanted_files(names, within, "model", "org/m", lambda name: {})
    assert words in str(caught.value)


def test_an_index_cannot_ask_for_files_elsewhere() -> None:
    names = ["config.json", "model.safetensors.index.json", "x.safetensors"]
    with pytest.raises(CheckpointError, match="not one plain name"):
        wanted_files(names, "", "model", "m", lambda name: {"weight_map": {"a": "../x.safetensors"}})


def test_a_model_is_opened_by_its_id(hub: HubServer, models: Path) -> None:
    commit = hub.add("org/tiny", models / "llama-ft1")  # which has three shards
    hub.repositories["org/tiny"].files["pytorch_model.bin"] = b"never read"
    there, here = open_checkpoint("org/tiny"), open_checkpoint(models / "llama-ft1")
    assert there.fingerprint() == here.fingerprint()
    assert hub_origin(there.path) == HubPlace("org/tiny", commit)
    assert "pytorch_model.bin" not in hub.fetched()
    asked = len(hub.fetched())
    assert open_checkpoint("org/tiny@main").fingerprint() == here.fingerprint()
    assert len(hub.fetched()) == asked, "what is in the cache is not fetched again"
    # A negative control: another commit gives other weights.
    hub.add("org/tiny", models / "llama-ft2")
    assert open_checkpoint("org/tiny").fingerprint() != here.fingerprint()
    assert open_checkpoint(f"org/tiny@{commit}").fingerprint() == here.fingerprint()


def test_a_tokenizer_is_fetched_without_the_weights(hub: HubServer, models: Path) -> None:
    from mergelab.text import load_tokenizer

    hub.add("org/tiny", models / "llama-base")
    assert load_tokenizer("org/tiny").vocab_size == load_tokenizer(models / "llama-base").vocab_size
    assert hub.fetched() and not any(name.endswith(".safetensors") for name in hub.fetched())


def test_a_subfolder_is_a_model_of_its_own(hub: HubServer, models: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(models / "llama-base", tmp_path / "repo" / "step-10")
    hub.add("org/steps", tmp_path / "repo")
    found = open_checkpoint("org/steps:step-10")
    assert found.fingerprint() == open_checkpoint(models / "llama-base").fingerprint()
    origin = hub_origin(found.path)
    assert origin is not None and origin.within == "step-10"


def test_a_path_that_exists_wins(hub: HubServer, models: Path, tmp_path: Path) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "tiny").symlink_to(models / "llama-base")
    open_checkpoint("org/tiny")
    assert hub.asked == []


def test_without_a_network_the_cache_serves(
    hub: HubServer, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/tiny", models / "llama-base")
    here = open_checkpoint("org/tiny").fingerprint()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    assert open_checkpoint("org/tiny").fingerprint() == here
    with pytest.raises(CheckpointError, match=r"org/other does not exist .*, and the hub .* cannot be"):
        open_checkpoint("org/other")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert open_checkpoint("org/tiny").fingerprint() == here
    with pytest.raises(CheckpointError, match=r"HF_HUB_OFFLINE is set .* has no copy of org/other@v1"):
        open_checkpoint("org/other@v1")


def test_refusals_of_the_hub_are_one_sentence(
    hub: HubServer, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/tiny", models / "llama-base")
    hub.add("org/gated", models / "llama-base")
    hub.repositories["org/gated"].gated = True
    for text, words in (
        ("org/none", "the hub has no model 'org/none' that you may read; check the spelling"),
        ("org/tiny@v9", "the hub's org/tiny has no revision 'v9'"),
        ("org/tiny:sub", "has no file or folder 'sub'"),
        ("org/gated", "is gated: accept its terms at"),
    ):
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(text)
        assert words in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "hf_read")
    assert open_checkpoint("org/gated").tensors, "the token from the usual place opens it"


def test_a_recipe_pins_the_commits_of_its_models(hub: HubServer, models: Path, tmp_path: Path) -> None:
    from mergelab.merging import merge, plan_merge

    commit = hub.add("org/base", models / "llama-base")
    hub.add("org/tuned", models / "llama-ft2", ref="v1")
    text = "merge_method: linear\nmodels:\n- {model: org/base, parameters: {weight: 1}}\n"
    (tmp_path / "r.yaml").write_text(text + "- {model: org/tuned@v1, parameters: {weight: 1}}\n")
    plan = plan_merge(tmp_path / "r.yaml")
    assert plan.models[0].revision == commit
    merge(plan, tmp_path / "from-hub")
    local = (tmp_path / "r.yaml").read_text().replace("org/base", str(models / "llama-base"))
    (tmp_path / "l.yaml").write_text(local.replace("org/tuned@v1", str(models / "llama-ft2")))
    merge(tmp_path / "l.yaml", tmp_path / "from-disk")
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "from-hub" / file).read_bytes() == (tmp_path / "from-disk" / file).read_bytes()


def test_a_soup_takes_ids(hub: HubServer, models: Path, tmp_path: Path) -> None:
    from mergelab.merging import soup

    hub.add("org/a", models / "llama-ft2")
    hub.add("org/b", models / "llama-ft3")
    soup(["org/a", "org/b"], tmp_path / "hub")
    soup([models / "llama-ft2", models / "llama-ft3"], tmp_path / "disk")
    found, wanted = (open_checkpoint(tmp_path / name).tensors for name in ("hub", "disk"))
    for name, tensor in wanted.items():
        a, b = (np.empty(tensor.shape, tensor.dtype).reshape(-1) for _ in range(2))
        tensor.read_into(0, a)
        found[name].read_into(0, b)
        assert a.tobytes() == b.tobytes()


def test_the_command_line_finds_the_hub_by_the_environment(
    hub: HubServer, models: Path, tmp_path: Path
) -> None:
    hub.add("org/tiny", models / "llama-base")
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "h"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "mergelab", "inspect", "org/tiny@main", "--json"],
        env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert '"model_type": "llama"' in done.stdout
