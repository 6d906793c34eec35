"""What a release holds and says: one address, packaged files, workflows, other packagers' files, schemas."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from mergelab.errors import SAEError
from mergelab.sae.training import load_config
from mergelab.shipped import shipped_file, shipped_folder, shipped_names
from mergelab.version import __version__

REPOSITORY = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("loaded", REPOSITORY / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The address.


@pytest.fixture(scope="module")
def address() -> ModuleType:
    return load(".ci/address.py")


def test_every_link_to_the_repository_is_that_of_the_project(address: ModuleType) -> None:
    assert address.disagreeing(REPOSITORY) == []
    owner, name = address.address(REPOSITORY).split("/")
    slug = f"github.com/{owner}/{name}"
    assert all(slug in url or f"{owner}.github.io/{name}" in url for url in PROJECT["urls"].values())
    for page in ("README.md", "docs/installation.md"):
        assert f"git+https://{slug}" in (REPOSITORY / page).read_text("utf-8")


def test_one_command_renames_the_repository(address: ModuleType, tmp_path: Path) -> None:
    for file in address.files(REPOSITORY):
        copy = tmp_path / file.relative_to(REPOSITORY)
        if not re.search("OWNER|github", text := file.read_text("utf-8")):
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text)
    count = address.rename(tmp_path, "some-lab/merge.lab")
    assert count > 25 and address.address(tmp_path) == "some-lab/merge.lab"
    assert address.disagreeing(tmp_path) == []
    left = [f.name for f in address.files(tmp_path) if "/OWNER/" in f.read_text("utf-8")]
    assert set(left) <= {"release.yml", "failures.py"}, "which look for the placeholder"
    (tmp_path / "README.md").write_text("[a](https://github.com/OWNER/merge.lab)")
    assert address.disagreeing(tmp_path) == ["README.md: github.com/OWNER/merge.lab"]


def test_indexes_get_a_readme_whose_links_lead_somewhere() -> None:
    text = "![figure](docs/a.png) [page](docs/a.md#b) [out](https://x.org/y) [here](#top)"
    with_addresses = load_hook().with_addresses(text, "https://github.com/o/n")
    assert with_addresses == (
        "![figure](https://github.com/o/n/raw/main/docs/a.png) "
        "[page](https://github.com/o/n/blob/main/docs/a.md#b) "
        "[out](https://x.org/y) [here](#top)"
    )


def load_hook() -> ModuleType:
    """The build's hook, without the build system that calls it."""
    stand_in = ModuleType("hatchling.metadata.plugin.interface")
    stand_in.MetadataHookInterface = object  # type: ignore[attr-defined]
    sys.modules.setdefault(stand_in.__name__, stand_in)
    return load("hatch_build.py")


# Versions and dependencies.


def test_the_version_is_said_alike_everywhere() -> None:
    changelog = (REPOSITORY / "CHANGELOG.md").read_text("utf-8")
    assert re.findall(r"^## \[(.+?)\]", changelog, re.M)[:2] == ["Unreleased", __version__]
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text("utf-8"))
    recipe = yaml.safe_load((REPOSITORY / "conda" / "recipe.yaml").read_text("utf-8"))
    assert citation["version"] == recipe["context"]["version"] == __version__
    assert f"## [{__version__}] - {citation['date-released']}" in changelog
    assert citation["license"] == PROJECT["license"] == recipe["about"]["license"]


ELSEWHERE = {"matplotlib": "matplotlib-base", "xxhash": "python-xxhash"}
"""Names under which conda-forge has what PyPI calls otherwise."""


def test_the_conda_recipe_has_the_dependencies_of_the_project() -> None:
    recipe = yaml.safe_load((REPOSITORY / "conda" / "recipe.yaml").read_text("utf-8"))
    wanted = [re.sub(r"\[.*?\]", "", one) for one in PROJECT["dependencies"]]
    wanted = [re.sub(r"^[\w-]+", lambda m: ELSEWHERE.get(m[0], m[0]), one) for one in wanted]
    found = [line.replace(" ", "") for line in recipe["requirements"]["run"]]
    assert found == [f"python{PROJECT['requires-python']}", *wanted]


def test_the_extras_name_the_accelerators_of_jax() -> None:
    extras = PROJECT["optional-dependencies"]
    assert extras["cuda12"] == ["jax[cuda12]"] and extras["cuda13"] == ["jax[cuda13]"]
    assert extras["tpu"] == ["jax[tpu]"]
    page = (REPOSITORY / "docs" / "installation.md").read_text("utf-8")
    named = set(re.findall(r"\.\[([\w,-]+)\]", page))
    assert {"cuda12", "cuda13", "tpu"} <= named
    assert {one for names in named for one in names.split(",")} <= extras.keys()


# Workflows, issue templates, images.

YAML_FILES = sorted(
    [*(REPOSITORY / ".github").rglob("*.yml"), REPOSITORY / "CITATION.cff", REPOSITORY / "conda/recipe.yaml"]
)


@pytest.mark.parametrize("file", YAML_FILES, ids=lambda f: f.name)
def test_it_is_yaml(file: Path) -> None:
    assert isinstance(yaml.safe_load(file.read_text("utf-8")), dict)


WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))


def faults_of_workflow(text: str) -> list[str]:
    """Actions that are not pinned, steps of `.ci/run` that it does not have, rights that nobody gave."""
    workflow = yaml.safe_load(text)
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    faults = [s["uses"] for s in steps if "uses" in s and not re.search(r"@[0-9a-f]{40}$", s["uses"])]
    known = re.findall(r"^run_(\w+)\(\)", (REPOSITORY / ".ci" / "run").read_text("utf-8"), re.M)
    named = re.findall(r"\.ci/run ((?:\w+ ?)+)$", text, re.M) + re.findall(r"steps: ([\w ]+),", text)
    faults += [word for line in named for word in line.split() if word not in known]
    if workflow.get("permissions") != {"contents": "read"}:
        faults.append("permissions")
    return faults


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda f: f.name)
def test_workflows_pin_their_actions_and_name_steps_that_exist(file: Path) -> None:
    text = file.read_text("utf-8")
    assert faults_of_workflow(text) == []
    assert faults_of_workflow(re.sub(r"@[0-9a-f]{40} # ", "@", text)) != []


def test_a_release_is_published_without_a_token() -> None:
    workflow = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "release.yml").read_text("utf-8"))
    publish = workflow["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"} and publish["needs"] == "build"
    assert "secrets." not in str(workflow)


@pytest.mark.parametrize("name", ["bug.yml", "request.yml"])
def test_issue_forms_ask_questions(name: str) -> None:
    form = yaml.safe_load((REPOSITORY / ".github" / "ISSUE_TEMPLATE" / name).read_text("utf-8"))
    assert {"name", "description", "body"} <= form.keys()
    identifiers = [part["id"] for part in form["body"]]
    assert len(set(identifiers)) == len(identifiers) > 0


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_images_copy_what_the_build_needs(name: str) -> None:
    text = (REPOSITORY / "docker" / f"Dockerfile.{name}").read_text("utf-8")
    copied = {word for line in re.findall(r"^COPY (.+) \S+$", text, re.M) for word in line.split()}
    assert copied == {"pyproject.toml", "hatch_build.py", "README.md", "LICENSE", "configs", "mergelab"}
    kept = (REPOSITORY / ".dockerignore").read_text("utf-8").split()
    assert {f"!{word}" for word in copied} <= {*kept}
    instructions = re.findall(r"^([A-Z]+) ", text, re.M)
    assert set(instructions) <= {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "ENV", "ENTRYPOINT", "CMD"}
    extras = re.findall(r"pip install .*\.\[([^\]]+)\]", text)[0].replace("${CUDA}", "cuda12").split(",")
    assert {*extras} <= PROJECT["optional-dependencies"].keys()


def test_the_steps_of_ci_are_bash(tmp_path: Path) -> None:
    for script in (".ci/run", "docs/build.sh"):
        assert subprocess.run(["bash", "-n", REPOSITORY / script]).returncode == 0
    bash = shutil.which("bash")
    assert bash is not None
    done = subprocess.run([bash, REPOSITORY / ".ci/run", "none"], capture_output=True, text=True)
    text = (REPOSITORY / ".ci" / "run").read_text("utf-8")
    assert done.returncode == 2
    for step in re.findall(r"^run_(\w+)\(\)", text, re.M):
        assert step in done.stderr and f"[{step}]" in " ".join(text.split("set -euo")[0].split())


# Configurations that come along.


def test_a_shipped_configuration_is_found_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    packaged = shipped_folder("sae") / "toy.yaml"
    assert shipped_file("toy.yaml", "sae") == shipped_file("configs/sae/toy.yaml", "sae") == packaged
    assert load_config("toy.yaml").data.kind == "toy"
    assert shipped_file("elsewhere/toy.yaml", "sae") == Path("elsewhere/toy.yaml")
    with pytest.raises(SAEError, match=r"check the path, or name one that comes with mergelab: .*toy\.yaml"):
        load_config("tou.yaml")
    (tmp_path / "toy.yaml").write_text("sae: {n_latents: 8}\ndata: {kind: files}\n")
    assert shipped_file("toy.yaml", "sae") == Path("toy.yaml")
    with pytest.raises(SAEError, match="train is missing"):
        load_config("toy.yaml")


# Schemas.


def schema(kind: str) -> dict[str, Any]:
    return json.loads((shipped_folder("schemas") / f"{kind}.json").read_text("utf-8"))


def skeleton(part: Any, path: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    """Properties and constants of a schema by path; the rest depends on the version of pydantic."""
    if isinstance(part, list):
        return {found for each in part for found in skeleton(each, path)}
    if not isinstance(part, dict):
        return set()
    found = {(*path, name) for name in part.get("properties", {})} | {
        (*path, str(v)) for v in part.get("enum", ())
    }
    found |= {(*path, f"={part['const']}")} if "const" in part else set()
    return found.union(*(skeleton(value, (*path, key)) for key, value in part.items()))


@pytest.fixture(scope="module")
def current() -> dict[str, dict[str, Any]]:
    from mergelab.cli.schema import schema_of

    return {kind: json.loads(schema_of(kind)) for kind in ("recipe", "sae")}


@pytest.mark.parametrize("kind", ["recipe", "sae"])
def test_the_schemas_are_up_to_date(kind: str, current: dict[str, dict[str, Any]]) -> None:
    """Written by `mergelab schema KIND > configs/schemas/KIND.json`."""
    Draft202012Validator.check_schema(schema(kind))
    assert skeleton(schema(kind)) == skeleton(current[kind])
    assert len(skeleton(schema(kind))) > 50


def faults(kind: str, text: str) -> list[str]:
    validator = Draft202012Validator(schema(kind))
    return [f"{e.json_path}: {e.message}" for d in yaml.safe_load_all(text) for e in validator.iter_errors(d)]


def configurations() -> list[tuple[str, str, str]]:
    found = [
        ("sae" if file.parent.name == "sae" else "recipe", file.name, file.read_text("utf-8"))
        for file in sorted((REPOSITORY / "configs").rglob("*.yaml"))
    ]
    for page in sorted([REPOSITORY / "README.md", *REPOSITORY.glob("docs/**/*.md")]):
        for n, text in enumerate(re.findall(r"^```yaml\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)):
            found.append(("sae" if text.startswith("sae:") else "recipe", f"{page.name} {n}", text))
    return found


def test_the_schemas_accept_every_configuration_and_recipe() -> None:
    wrong = {name: found for kind, name, text in configurations() if (found := faults(kind, text))}
    assert wrong == {}
    assert {"toy.yaml", "ties.yaml", "README.md 0"} <= {name for _, name, _ in configurations()}


@pytest.mark.parametrize(
    ("kind", "name", "old", "new"),
    [
        ("recipe", "ties.yaml", "merge_method: ties", "merge_method: tise"),
        ("recipe", "ties.yaml", "density: 0.2", "desnity: 0.2"),
        ("recipe", "ties.yaml", "base_model:", "base_modle:"),
        ("recipe", "ties.yaml", "dtype: bfloat16", "dtype: bf16"),
        ("sae", "toy.yaml", "k: 16", "kk: 16"),
        ("sae", "toy.yaml", "variant: topk", "variant: topq"),
        ("sae", "toy.yaml", "batch_size: 1024", "batch_size: 0"),
        ("sae", "toy.yaml", "kind: toy", "kind: toys"),
        ("sae", "toy.yaml", "n_features: 1024", "n_feature: 1024"),
    ],
)
def test_the_schemas_see_what_is_mistyped(kind: str, name: str, old: str, new: str) -> None:
    folder = shipped_folder("sae" if kind == "sae" else "recipes")
    text = (folder / name).read_text("utf-8")
    assert old in text and name in shipped_names(folder.name)
    assert faults(kind, text) == [] and faults(kind, text.replace(old, new, 1)) != []
