"""`mergelab merge`: the plan it prints, the folder it writes, and how it fails."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mergelab.cli import options
from mergelab.cli.main import cli
from mergelab.cli.options import SIZE, readable
from tests.merging.recipes import write_model

RECIPE = "merge_method: linear\nmodels:\n- model: a\n- model: b\nparameters: {weight: 1}\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "a")
    write_model(tmp_path / "b", seed=1)
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["merge", *arguments])


def test_dry_run_prints_the_plan_and_writes_nothing(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    result = run("r.yaml", "--dry-run")
    assert result.exit_code == 0, result.output
    for line in ("method   linear", "models   a, b", "tensors  12 (12 linear)", "write    640 B (float32)"):
        assert line in result.output
    assert "needed" in result.output
    assert sorted(folder.rglob("*")) == before


def test_dry_run_as_json(folder: Path) -> None:
    (folder / "a" / "config.json").write_text('{"num_hidden_layers": 3, "rope_theta": 1.0}')
    (folder / "b" / "config.json").write_text('{"num_hidden_layers": 3, "rope_theta": 2.0}')
    plan = json.loads(run("r.yaml", "--dry-run", "--json", "--dtype", "bfloat16", "--seed", "4").stdout)
    assert plan["tensors"] == 12
    assert plan["operations"] == {"linear": 12}
    assert plan["bytes_in"] == 4 * plan["bytes_out"] == 1280
    assert plan["disk_needed"] <= plan["disk_free"]
    assert plan["peak_memory"] > 10**8
    assert plan["seed"] == 4
    (warning,) = plan["warnings"]
    assert warning.startswith("rope_theta is 2.0 in model 'b' and 1.0 in 'a'")


def test_a_graph_shows_its_stages(folder: Path) -> None:
    (folder / "r.yaml").write_text(f"name: half\n{RECIPE}---\n{RECIPE.replace('model: b', 'model: half')}")
    result = run("r.yaml", "--dry-run")
    assert "first, half:\n  method   linear\n  models   a, b\n" in result.output
    assert "models   a, half" in result.output
    plan = json.loads(run("r.yaml", "--dry-run", "--json").stdout)
    assert plan["disk_needed"] == 2 * plan["bytes_out"]


def test_merge_writes_and_reports(folder: Path) -> None:
    result = run("r.yaml", "--out", "out", "--shard-size", "500B", "--sha256")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("out: 12 tensors, 640 B, in ")
    assert (folder / "out" / "model.safetensors.index.json").is_file()
    assert (folder / "out" / "SHA256SUMS").is_file()
    report = json.loads(run("r.yaml", "--out", "out", "--overwrite", "--json").stdout)
    assert report["bytes_in"] == 2 * report["bytes_out"] == 1280
    assert 0 < report["seconds_streaming"] < report["seconds"]


def test_failures_are_one_line_each_with_status_2(folder: Path) -> None:
    (folder / "bad.yaml").write_text(RECIPE.replace("weight", "wieght").replace("linear", "ties"))
    result = run("bad.yaml", "--out", "out")
    assert result.exit_code == 2
    lines = result.stderr.strip().splitlines()
    assert all(line.startswith("error: bad.yaml:") for line in lines)
    assert (
        "error: bad.yaml:5: parameters.wieght: unknown parameter of 'ties' (did you mean 'weight'?)" in lines
    )
    assert len(lines) == 4
    assert not (folder / "out").exists()
    assert "does not exist" in run("nowhere.yaml", "--dry-run").stderr


def test_the_output_folder_is_asked_for(folder: Path) -> None:
    result = run("r.yaml")
    assert result.exit_code == 2
    assert "--out DIR" in result.stderr


def test_embeddings_are_cut_only_when_asked(folder: Path) -> None:
    write_model(folder / "b", rows=9, seed=1)
    refused = run("r.yaml", "--out", "out")
    assert refused.exit_code == 2
    assert "--unsafe-truncate-embeddings" in refused.stderr
    assert run("r.yaml", "--out", "out", "--unsafe-truncate-embeddings").exit_code == 0
    assert json.loads((folder / "out" / "config.json").read_text())["vocab_size"] == 6


def test_help_has_examples() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "Examples:" in result.output
    assert "mergelab merge ties.yaml --out merged" in result.output


@pytest.mark.parametrize(
    ("written", "size"),
    [("5GB", 5 * 10**9), ("512MiB", 512 * 2**20), ("1.5 gb", 1_500_000_000), ("100", 100), ("2k", 2000)],
)
def test_sizes(written: str, size: int) -> None:
    assert SIZE.convert(written, None, None) == size


@pytest.mark.parametrize("written", ["five", "5XB", "-1GB", "0", ""])
def test_wrong_sizes_are_refused(folder: Path, written: str) -> None:
    result = run("r.yaml", "--dry-run", f"--shard-size={written}")
    assert result.exit_code == 2
    assert "write" in result.stderr


def test_readable_sizes() -> None:
    assert [readable(n) for n in (0, 999, 1234, 5 * 10**9, 2 * 10**12)] == [
        "0 B",
        "999 B",
        "1.23 kB",
        "5 GB",
        "2 TB",
    ]


def test_another_architecture_is_refused_by_the_dry_run_and_merged_with_a_warning_when_told(
    folder: Path,
) -> None:
    (folder / "b" / "config.json").write_text('{"model_type": "mistral", "num_hidden_layers": 3}')
    refused = run("r.yaml", "--dry-run")
    assert refused.exit_code != 0
    assert "is of model_type 'mistral'" in str(refused.exception) + refused.output
    told = run("r.yaml", "--out", "out", "--allow-mixed-architectures", "--json")
    assert told.exit_code == 0, told.output
    assert "model_type is 'mistral'" in "".join(json.loads(told.stdout)["warnings"])
    assert "warning: model_type is 'mistral'" in told.stderr


def test_xla_gets_one_thread_only_where_nothing_but_a_merge_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import jax

    settings: dict[str, object] = {}
    monkeypatch.setattr(jax.config, "update", settings.__setitem__)
    monkeypatch.setenv("XLA_FLAGS", "--other")
    options.configure_jax()
    assert os.environ["XLA_FLAGS"] == "--other", "what runs a model keeps all threads"
    assert settings and "jax_cpu_enable_async_dispatch" not in settings
    options.configure_jax(merging=True)
    assert os.environ["XLA_FLAGS"] == "--other --xla_cpu_multi_thread_eigen=false"
    assert settings["jax_cpu_enable_async_dispatch"] is False

    given: list[tuple[str, bool]] = []
    command = ""

    def called(*, merging: bool = False) -> None:
        given.append((command, merging))

    monkeypatch.setattr(options, "configure_jax", called)
    for command, arguments in {
        "merge": "r.yaml --dry-run",
        "soup": "nowhere --out out",
        "greedy": "nowhere --out out --method greedy",
        "generate": "a --prompt x --max-new-tokens 1",
    }.items():
        CliRunner().invoke(cli, [command.replace("greedy", "soup"), *arguments.split()])
    assert given == [("merge", True), ("soup", True), ("greedy", False), ("generate", False)]
