"""`s3://` through s3fs, against a server on this machine (moto)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.goldens.models import write_models

pytestmark = pytest.mark.extra


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What points clients at the server; they read it when they are made, so commands run by themselves."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    home = str(tmp_path_factory.mktemp("cache"))
    yield {**os.environ, **keys, "AWS_ENDPOINT_URL": f"http://{host}:{port}", "XDG_CACHE_HOME": home}
    server.stop()


def run(environment: dict[str, str], folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=folder, capture_output=True, text=True, timeout=600
    )


def test_a_merge_from_bucket_to_bucket(environment: dict[str, str], tmp_path: Path) -> None:
    write_models(tmp_path / "models")
    source = str(tmp_path / "models" / "llama-ft2")
    open_s3 = "import s3fs, sys; s3 = s3fs.S3FileSystem(); "
    put = f"{open_s3}s3.mkdir('bucket'); s3.put(sys.argv[1], 'bucket/tuned', recursive=True)"
    done = run(environment, tmp_path, "-c", put, source)
    assert done.returncode == 0, done.stderr
    recipe = "merge_method: linear\nmodels: [{model: MODEL, parameters: {weight: 1}}]\n"
    (tmp_path / "s3.yaml").write_text(recipe.replace("MODEL", "s3://bucket/tuned"))
    (tmp_path / "disk.yaml").write_text(recipe.replace("MODEL", source))
    seen = run(environment, tmp_path, "-m", "mergelab", "inspect", "s3://bucket/tuned")
    assert seen.returncode == 0 and "s3://bucket/tuned" in seen.stdout, seen.stderr
    for name, out in (("s3", "s3://bucket/merged"), ("disk", "merged")):
        done = run(environment, tmp_path, "-m", "mergelab", "merge", f"{name}.yaml", "--out", out)
        assert done.returncode == 0, done.stderr
    get = f"{open_s3}sys.stdout.buffer.write(s3.cat_file('bucket/merged/' + sys.argv[1]))"
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        there = subprocess.run(
            [sys.executable, "-c", get, file], env=environment, capture_output=True, check=True
        )
        assert there.stdout == (tmp_path / "merged" / file).read_bytes()
    missing = run(environment, tmp_path, "-m", "mergelab", "inspect", "s3://bucket/none")
    assert missing.returncode == 2 and "s3://bucket/none does not exist" in missing.stderr
    foreign = run(environment, tmp_path, "-m", "mergelab", "inspect", "s3://nobodys-bucket/none")
    assert foreign.returncode == 2 and "Traceback" not in foreign.stderr, foreign.stderr
