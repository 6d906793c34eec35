"""SAEs trained from bucket to bucket: data, runs that are resumed, and evaluation at `s3://` (moto)."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.hub.test_s3 import environment, run

__all__ = ["environment"]  # the server, a fixture

pytestmark = pytest.mark.extra

CONFIG = {
    "sae": {"variant": "topk", "n_latents": 32, "k": 4},
    "data": {"kind": "files", "path": "PLACE", "buffer_rows": 1024},
    "train": {"batch_size": 64, "tokens": 64 * 24, "lr": 3e-3},
    "checkpoint": {"every": 8, "log_every": 4},
}
S3 = "import s3fs, sys; s3 = s3fs.S3FileSystem(); "


@pytest.fixture
def bucket(environment: dict[str, str], tmp_path: Path) -> Iterator[Path]:
    """A folder whose activations lie in a bucket too."""
    rows = np.random.default_rng(0).normal(size=(1500, 16)).astype(np.float32)
    (tmp_path / "acts").mkdir()
    for number in range(3):
        np.save(tmp_path / "acts" / f"rows-{number}.npy", rows[number * 500 : (number + 1) * 500])
    for name, place in (("disk", str(tmp_path / "acts")), ("s3", "s3://runs/acts")):
        config = {**CONFIG, "data": {**CONFIG["data"], "path": place}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    put = f"{S3}s3.exists('runs') or s3.mkdir('runs'); s3.put(sys.argv[1], 'runs/acts', recursive=True)"
    done = run(environment, tmp_path, "-c", put, str(tmp_path / "acts"))
    assert done.returncode == 0, done.stderr
    yield tmp_path
    assert not [path.name for path in tmp_path.iterdir() if ":" in path.name]  # no folder called `s3:`


def test_a_run_in_a_bucket_is_that_on_a_disk_and_goes_on(environment: dict[str, str], bucket: Path) -> None:
    lab = ("-m", "mergelab", "sae")
    done = run(environment, bucket, *lab, "train", "disk.yaml", "--out", "alone")
    assert done.returncode == 0, done.stderr
    killed = (
        "import os; from mergelab.sae.training import train\n"
        "train('s3.yaml', 's3://runs/run', progress=lambda done, *_: done < 20 or os._exit(9))"
    )
    assert run(environment, bucket, "-c", killed).returncode == 9
    # What a machine that is taken away leaves is in the bucket: another one goes on with it.
    elsewhere = {**environment, "XDG_CACHE_HOME": str(bucket / "other-cache")}
    done = run(elsewhere, bucket, *lab, "train", "s3.yaml", "--out", "s3://runs/run", "--resume")
    assert done.returncode == 0 and "s3://runs/run" in done.stdout, done.stderr
    assert "no checkpoint" not in done.stderr
    get = f"{S3}sys.stdout.write(s3.cat_file('runs/run/final/sae.safetensors').hex())"
    there = run(environment, bucket, "-c", get).stdout
    assert there == (bucket / "alone" / "final" / "sae.safetensors").read_bytes().hex()
    judge = ("eval", "s3://runs/run", "--data", "s3://runs/acts", "--json")
    judged = [run(environment, bucket, *lab, *judge)]
    judged.append(run(environment, bucket, *lab, "eval", "alone", "--data", "acts/*.npy", "--json"))
    assert [one.returncode for one in judged] == [0, 0], judged[0].stderr
    assert json.loads(judged[0].stdout) == json.loads(judged[1].stdout)


def test_what_cannot_be_at_a_url_is_refused_before_any_work(
    environment: dict[str, str], bucket: Path
) -> None:
    done = run(
        environment, bucket, "-m", "mergelab", "sae", "eval", "run", "--data", "acts", "--keep", "gs://a/b"
    )
    assert done.returncode == 2 and "is a URL; give a path of this machine" in done.stderr, done.stderr
    several = (
        "import jax; jax.config.update('jax_platforms', 'cpu'); jax.process_count = lambda: 2\n"
        "from mergelab.cli.main import main; import sys; sys.argv = ['mergelab', *sys.argv[1:]]; main()"
    )
    for command in (
        ("sae", "train", "s3.yaml", "--out", "s3://runs/many"),
        (
            "activations",
            "model",
            "--site",
            "blocks.0.resid_post",
            "--text",
            "s3.yaml",
            "--out",
            "s3://runs/m",
        ),
    ):
        done = run(environment, bucket, "-c", several, *command)
        assert done.returncode == 2 and "cannot be written by several processes" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and sys.executable not in done.stderr
