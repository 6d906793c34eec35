"""Pushing to the hub, through the real client: what arrives, what is refused early, what is resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result

import mergelab as ml
from mergelab.checkpoints import open_checkpoint
from mergelab.checkpoints.hub_push import check_push
from mergelab.cli.main import cli
from mergelab.errors import CheckpointError, OutputError
from mergelab.interp import SteeringVector
from tests.hub_server import HubServer, card_errors

# The client's own, of how it uploads.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def writer(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """The server, and a token that may write."""
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    return hub


def front(card: bytes) -> dict[str, object]:
    return yaml.safe_load(card.decode().split("---\n")[1])


def test_a_folder_arrives_in_one_commit_and_is_read_back(
    writer: HubServer, models: Path, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(models / "llama-ft1", tmp_path / "out")
    (tmp_path / "out" / ".hidden").write_text("stays here")
    url = ml.push(tmp_path / "out", "org/new", private=True)
    there = writer.repositories["org/new"]
    assert url == f"{writer.url}/org/new/commit/{there.refs['main']}" and there.private
    here = {p.name: p.read_bytes() for p in (models / "llama-ft1").iterdir()}
    assert there.files.keys() - here.keys() == {"README.md"} and not here.keys() - there.files.keys()
    assert all(there.files[name] == content for name, content in here.items())
    assert card_errors(there.files["README.md"].decode()) == []
    assert open_checkpoint("org/new").fingerprint() == open_checkpoint(models / "llama-ft1").fingerprint()
    # Again, with other shards: those of before are gone, and the card of before stays.
    card, commits = there.files["README.md"], len(there.commits)
    ml.push(models / "llama-ft2", "org/new")
    assert "model-00001-of-00003.safetensors" not in there.files and there.files["README.md"] == card
    assert open_checkpoint("org/new").fingerprint() == open_checkpoint(models / "llama-ft2").fingerprint()
    assert len(there.commits) == commits + 1


def test_an_interrupted_push_is_repeated(writer: HubServer, models: Path) -> None:
    writer.broken_uploads = 1
    with pytest.raises(OutputError, match=r"is complete, but pushing it .* the hub refuses .* out of order"):
        ml.push(models / "llama-ft1", "org/new")
    there = writer.repositories["org/new"]
    assert not there.files, "nothing is seen of a push that has not finished"
    kept = len(writer.blobs)
    writer.asked.clear()
    ml.push(models / "llama-ft1", "org/new")
    large = sum(file.stat().st_size > 1000 for file in (models / "llama-ft1").iterdir())
    uploads = sum(line.startswith("PUT /lfs/") for line in writer.asked)
    assert uploads == large - kept < large, "what had arrived is not uploaded again"
    assert open_checkpoint("org/new").tensors


def test_what_cannot_succeed_is_refused_before_any_work(
    hub: HubServer, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no-org", "org/na me", "../x/y", "org/name@v1", "org/name:sub"):
        with pytest.raises(OutputError, match="is not the name of a hub repository"):
            check_push(name)
    with pytest.raises(OutputError, match="needs a token of the hub"):
        check_push("org/new")
    monkeypatch.setenv("HF_TOKEN", "hf_read")
    with pytest.raises(OutputError, match="may only read"):
        check_push("org/new")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(OutputError, match=r"pushing to org/new is not possible: the hub refuses"):
        check_push("org/new")
    recipe = f"merge_method: linear\nmodels: [{{model: {models / 'llama-ft2'}, parameters: {{weight: 1}}}}]\n"
    (tmp_path / "r.yaml").write_text(recipe)
    done = CliRunner().invoke(cli, ["merge", "r.yaml", "--out", "out", "--push", "org/new"])
    assert done.exit_code == 2 and "the hub refuses" in done.output and not (tmp_path / "out").exists()
    assert not hub.repositories


def test_a_card_that_the_hub_refuses_is_named(writer: HubServer, models: Path, tmp_path: Path) -> None:
    (tmp_path / "v.npy").write_bytes(b"x")
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("---\nbase_model: [../base]\n---\n# x\n")
    with pytest.raises(OutputError, match=r"the hub refuses the card .*base_model\[0\].* correct README.md"):
        ml.push(out, "org/x")
    with pytest.raises(OutputError, match="does not exist"):
        ml.push(tmp_path / "nothing", "org/x")


def test_a_file_is_pushed_with_a_card(writer: HubServer, tmp_path: Path) -> None:
    np.save(tmp_path / "vector.npy", np.arange(4))
    ml.push(tmp_path / "vector.npy", "org/vector")
    files = writer.repositories["org/vector"].files
    assert files["vector.npy"] == (tmp_path / "vector.npy").read_bytes()
    assert card_errors(files["README.md"].decode()) == []


CARD = "---\nlicense: other\nlicense_name: tiny\nlicense_link: LICENSE\n---\n# tiny\n"


def test_merges_say_to_the_hub_what_they_are_made_of(writer: HubServer, models: Path, tmp_path: Path) -> None:
    import shutil

    for name in ("llama-ft2", "llama-ft3"):
        shutil.copytree(models / name, tmp_path / name)
        (tmp_path / name / "README.md").write_text(CARD)
    writer.add("org/two", tmp_path / "llama-ft2")
    writer.add("org/three", tmp_path / "llama-ft3")
    lines = [f"- {{model: {name}, parameters: {{weight: 1}}}}" for name in ("org/two@main", "org/three")]
    (tmp_path / "r.yaml").write_text("\n".join(["merge_method: linear", "models:", *lines]))
    done = CliRunner().invoke(cli, ["merge", "r.yaml", "--out", "out", "--push", "org/merged"])
    assert done.exit_code == 0, done.output
    files = writer.repositories["org/merged"].files
    assert card_errors(files["README.md"].decode()) == []
    said = front(files["README.md"])
    assert said == {
        "library_name": "transformers",
        "tags": ["mergelab", "mergekit", "merge", "linear"],
        "base_model": ["org/two", "org/three"],
        "license": "other",
        "license_name": "tiny",
        "license_link": "LICENSE",
        "pipeline_tag": "text-generation",
    }
    assert open_checkpoint("org/merged").fingerprint() == open_checkpoint(tmp_path / "out").fingerprint()


def test_inputs_that_disagree_give_no_license_and_paths_no_base(models: Path, tmp_path: Path) -> None:
    from mergelab.checkpoints.model_card import card_facts, portable_name

    for name, text in (("a", "license: mit"), ("b", "license: apache-2.0"), ("c", ""), ("d", "[broken")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(f"---\n{text}\n---\n")
    license_of = lambda *names: card_facts([tmp_path / name for name in names]).license  # noqa: E731
    assert license_of("a") == license_of("a", "a") == {"license": "mit"}
    assert license_of("a", "b") == license_of("a", "c") == license_of("d") == license_of() == {}
    assert card_facts([tmp_path / "a"]).base_models == ()
    assert portable_name(tmp_path / "a") == "a" and portable_name("gs://bucket/m") == "gs://bucket/m"


def test_an_adapter_is_pushed_with_its_base(writer: HubServer, models: Path, tmp_path: Path) -> None:
    commit = writer.add("org/base", models / "llama-base")
    command = [
        "extract-lora",
        str(models / "llama-ft2"),
        "--base",
        "org/base",
        "--rank",
        "2",
        "--target",
        "*.q_proj",
        "--out",
        "adapter",
    ]
    done = CliRunner().invoke(cli, [*command, "--push", "org/adapter"])
    assert done.exit_code == 0, done.output
    files = writer.repositories["org/adapter"].files
    assert front(files["README.md"])["base_model"] == ["org/base"]
    assert front(files["README.md"])["library_name"] == "peft"
    config = json.loads(files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", commit)
    assert card_errors(files["README.md"].decode()) == []


def test_a_steering_vector_comes_back_from_the_hub(writer: HubServer, tmp_path: Path) -> None:
    vector = SteeringVector(jnp.ones(4), jnp.float32(2.0), "blocks.1.resid_post", "llama")
    ml.push(ml.save_steering(vector, tmp_path / "v.gguf"), "org/vector")
    found = ml.load_steering("org/vector:v.gguf")
    assert list(found) == ["blocks.1.resid_post"]
    with pytest.raises(CheckpointError, match=r"has no file or folder 'w\.gguf'"):
        ml.load_steering("org/vector:w.gguf")


@pytest.mark.slow
def test_an_abliterated_model_is_pushed_with_its_direction(
    writer: HubServer, models: Path, tmp_path: Path
) -> None:
    from mergelab.abliteration import load_direction

    writer.add("org/base", models / "llama-ft1")
    for name, start in (("harmful", 1), ("harmless", 3)):
        lines = [f"{chr(97 + n)}{chr(97 + (n * start) % 20)} {'xyz'[n % 3]}" for n in range(8)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    # A model that was never trained refuses nothing: every filter is opened.
    options = "--anyway --max-kl 1e9 --min-induced=-1e9 --answer-tokens 2 --batch 2 --refusal I --refusal the"
    sets = ["--harmful", "harmful.txt", "--harmless", "harmless.txt", "--out", "out", "--push", "org/edited"]
    done = CliRunner().invoke(cli, ["abliterate", "org/base", *sets, *options.split()])
    assert done.exit_code == 0, done.output
    there = writer.repositories["org/edited"]
    here = {p.relative_to("out").as_posix(): p.read_bytes() for p in Path("out").rglob("*") if p.is_file()}
    assert there.files == here and "abliteration/direction.safetensors" in there.files
    card = there.files["README.md"].decode()
    assert card_errors(card) == [] and front(there.files["README.md"])["base_model"] == ["org/base"]
    assert "`org/base`, edited with mergelab" in card and str(tmp_path) not in card
    report = json.loads(there.files["abliteration.json"])
    assert report["model"] == "org/base" and str(tmp_path) not in json.dumps(report)
    (tmp_path / "pulled.safetensors").write_bytes(there.files["abliteration/direction.safetensors"])
    direction = load_direction(tmp_path / "pulled.safetensors")
    assert direction.computed_from["model"] == "org/base"
    assert direction.vector.site == f"blocks.{report['selection']['chosen']['layer']}.resid_pre"
    # What servers and `transformers` take for weights is the model alone.
    assert [name for name in there.files if name.endswith(".safetensors") and "/" not in name] == [
        name for name in here if name.startswith("model") and name.endswith(".safetensors")
    ]
    assert open_checkpoint("org/edited").fingerprint() == open_checkpoint(tmp_path / "out").fingerprint()


def invoke(*arguments: str) -> Result:
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    return done


def test_a_soup_of_models_on_the_hub_is_pushed(writer: HubServer, models: Path) -> None:
    for name in ("llama-ft2", "llama-ft3"):
        writer.add(f"org/{name}", models / name)
    done = invoke("soup", "org/llama-ft2", "org/llama-ft3", "--out", "out", "--json", "--push", "org/soup")
    there = writer.repositories["org/soup"]
    assert done.stderr.endswith(f"pushed to {writer.url}/org/soup/commit/{there.refs['main']}\n")
    assert json.loads(done.stdout)["members"] == ["org/llama-ft2", "org/llama-ft3"]
    assert open_checkpoint("org/soup").fingerprint() == open_checkpoint("out").fingerprint()
    card = there.files["README.md"].decode()
    assert card_errors(card) == [] and "merge" in str(front(card.encode())["tags"])


@pytest.mark.slow  # training compiles; the export below takes the same way
def test_a_training_is_pushed_to_the_hub(writer: HubServer, tmp_path: Path) -> None:
    toy = {"kind": "toy", "toy": {"d_in": 8, "n_features": 16, "l0": 2.0}, "buffer_rows": 64}
    config = {"sae": {"variant": "topk", "n_latents": 16, "k": 2}, "data": toy}
    config["train"] = {"batch_size": 16, "tokens": 32}
    (tmp_path / "sae.yaml").write_text(yaml.safe_dump(config))
    done = invoke("sae", "train", "sae.yaml", "--out", "run", "--push", "org/sae", "--json")
    assert "pushed to" in done.stderr and json.loads(done.stdout)["steps"] == 2
    files = writer.repositories["org/sae"].files
    assert {"README.md", "cfg.json", "sae.safetensors"} <= files.keys()
    assert not any(name.startswith("checkpoints") for name in files)
    assert np.array_equal(ml.load_sae("org/sae").W_dec, ml.load_sae("run").W_dec)
    assert card_errors(files["README.md"].decode()) == []


def test_an_autoencoder_comes_back_from_the_hub(writer: HubServer, tmp_path: Path) -> None:
    from mergelab.sae.sae import SAE, SAEConfig

    draw = np.random.default_rng(0).standard_normal
    arrays = {"W_enc": draw((4, 8)), "b_enc": draw(8), "W_dec": draw((8, 4)), "b_dec": draw(4)}
    told = {"site": "blocks.1.resid_post", "model": "org/base"}
    sae = SAE(
        **{name: value.astype(np.float32) for name, value in arrays.items()},
        config=SAEConfig(activation="relu", metadata=told),
    )
    ml.save_sae(sae, tmp_path / "run" / "final")
    ml.push(tmp_path / "run", "org/sae")
    files = writer.repositories["org/sae"].files
    assert {"cfg.json", "sae.safetensors", "README.md"} <= files.keys()
    assert front(files["README.md"])["base_model"] == ["org/base"]
    assert card_errors(files["README.md"].decode()) == []
    back = ml.load_sae("org/sae")
    assert np.array_equal(back.W_dec, sae.W_dec) and back.config.metadata["site"] == told["site"]
    # The command takes it from there and pushes it in another library's files.
    arguments = ("--format", "saelens", "--out", "theirs", "--push", "org/theirs")
    done = invoke("sae", "export", "org/sae", *arguments)
    assert done.stdout == "theirs\n" and f"pushed to {writer.url}/org/theirs/commit/" in done.stderr
    assert np.array_equal(ml.load_sae("org/theirs").W_enc, sae.W_enc)
    assert card_errors(writer.repositories["org/theirs"].files["README.md"].decode()) == []


def test_an_exported_autoencoder_has_a_card_that_says_how_it_is_loaded(
    writer: HubServer, tmp_path: Path
) -> None:
    from mergelab.sae.sae import SAE, SAEConfig

    draw = np.random.default_rng(0).standard_normal
    arrays = {"W_enc": draw((4, 8)), "b_enc": draw(8), "W_dec": draw((8, 4)), "b_dec": draw(4)}
    told = {
        "site": "blocks.1.resid_post", "model": "org/base", "training": {"nmse": 0.1234567, "note": "x"},
    }  # fmt: skip
    sae = SAE(
        **{name: value.astype(np.float32) for name, value in arrays.items()},
        config=SAEConfig("topk", 3, transcoder=False, metadata=told),
    )
    ml.save_sae(sae, tmp_path / "own")
    asked = ["sae", "export", str(tmp_path / "own"), "--format", "saelens", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(cli, [*asked, "--push", "org/sae-lens"])
    assert done.exit_code == 0, done.output
    files = writer.repositories["org/sae-lens"].files
    assert {"cfg.json", "sae_weights.safetensors", "README.md"} <= files.keys()
    card, said = files["README.md"].decode(), front(files["README.md"])
    assert card_errors(card) == []
    assert (said["library_name"], said["base_model"]) == ("saelens", ["org/base"])
    assert {"saelens", "sparse-autoencoder", "topk"} <= {*said["tags"]}
    assert 'SAE.load_from_disk(snapshot_download("org/sae-lens"))' in card
    assert "topk, k 3" in card and "nmse 0.1235" in card and "note" not in card and str(tmp_path) not in card
    assert np.allclose(ml.load_sae("org/sae-lens").W_dec, sae.W_dec)
    nameless = replace(sae, config=replace(sae.config, metadata={**told, "model": "/home/me/base"}))
    ml.save_sae(nameless, tmp_path / "nameless")
    card = (tmp_path / "nameless" / "README.md").read_bytes()
    assert "base_model" not in front(card) and b"/home/me" not in card


def test_the_server_refuses_what_the_hub_refuses() -> None:
    """The negative control of the checks above."""
    assert card_errors("---\nbase_model: [/home/me/base]\n---\n")
    assert card_errors("---\nlicense: other\n---\n") and card_errors("---\nlicense: MIT License\n---\n")
