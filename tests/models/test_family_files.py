"""Files of every family: what is loaded and saved again has the names, dtypes and bytes it had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mergelab.errors import CheckpointError, OutputError
from mergelab.models.families import model_from_config
from mergelab.models.load import load_model
from mergelab.models.orbax import is_orbax_model, load_orbax, save_orbax
from mergelab.models.save import save_model
from mergelab.operators import OPERATORS
from mergelab.sharding import make_mesh
from tests.models.tiny_models import CONFIGS, TOKENS, weights, write
from tests.slow import slow_except

FLOATS: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def written(folder: Path, name: str, dtype: str) -> dict[str, np.ndarray]:
    write(folder, name)
    made = {n: a.astype(FLOATS[dtype]) for n, a in weights(model_from_config(CONFIGS[name])).items()}
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    return made


def same_bytes(folder: Path, tensors: dict[str, np.ndarray]) -> bool:
    found = load_file(folder / "model.safetensors")
    return found.keys() == tensors.keys() and all(
        found[n].dtype == a.dtype and found[n].shape == a.shape and found[n].tobytes() == a.tobytes()
        for n, a in tensors.items()
    )


@pytest.mark.parametrize("dtype", slow_except(["bfloat16"], FLOATS))
@pytest.mark.parametrize("name", CONFIGS)
def test_saving_a_loaded_model_gives_its_files_back(name: str, dtype: str, tmp_path: Path) -> None:
    tensors = written(tmp_path / "in", name, dtype)
    model, params = load_model(tmp_path / "in", mesh=make_mesh({"fsdp": 2, "tensor": 4}))
    assert {str(a.dtype) for a in jax.tree.leaves(params)} == {dtype}
    out = save_model(model, params, tmp_path / "out", files={"tokenizer.json": b"{}"})
    assert same_bytes(out, tensors)
    assert json.loads((out / "config.json").read_text()) == {**CONFIGS[name], "torch_dtype": dtype}
    assert (out / "tokenizer.json").read_bytes() == b"{}"
    first = next(iter(tensors))
    assert not same_bytes(out, {**tensors, first: -tensors[first]})


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "mixtral"])
def test_a_model_computes_the_same_on_a_mesh(name: str, tmp_path: Path) -> None:
    folder, tokens = write(tmp_path, name), jnp.asarray(TOKENS)
    found = []
    for mesh in (None, make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
        model, params = load_model(folder, mesh=mesh)
        found.append(np.asarray(jax.jit(lambda p, m=model: m.apply(p, tokens).logits)(params)))
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=2e-5)
    assert np.abs(found[0]).max() > 0.1


def test_files_that_are_not_the_models_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, "llama")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {**tensors, "model.layers.0.mlp.gate.weight": np.zeros(3, np.float32)}, folder / "model.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"'model.layers.0.mlp.gate.weight'.*did you mean"):
        load_model(folder)
    tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks the tensor 'model.norm.weight'"):
        load_model(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "lama"}))
    with pytest.raises(CheckpointError, match="did you mean 'llama'"):
        load_model(folder)


def test_orbax_folders_go_from_mesh_to_mesh_and_back_to_files(tmp_path: Path) -> None:
    tensors = written(tmp_path / "in", "mixtral", "bfloat16")
    model, params = load_model(tmp_path / "in", mesh=make_mesh({"fsdp": 2, "tensor": 4}))
    folder = save_orbax(model, params, tmp_path / "orbax", files={"tokenizer.json": b"{}"})
    assert is_orbax_model(folder) and not is_orbax_model(tmp_path / "in")
    with pytest.raises(OutputError, match="not empty"):
        save_orbax(model, params, folder)
    mesh = make_mesh({"data": 2, "fsdp": 4})
    for target in (None, mesh):
        again, restored = load_orbax(folder, mesh=target)
        assert again == model
        assert same_bytes(save_model(again, restored, tmp_path / str(target is None)), tensors)
    kernel = restored["blocks_0"]["attn"]["q"]["kernel"]
    assert kernel.sharding.mesh == mesh and kernel.sharding.spec[0] == "fsdp"
    wide = load_orbax(folder, dtype="float32")[1]["embed"]["embedding"]
    np.testing.assert_array_equal(np.asarray(wide), tensors["model.embed_tokens.weight"].astype(np.float32))
    (folder / "config.json").write_text(json.dumps({**CONFIGS["mixtral"], "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match="lacks the parameter 'blocks_2"):
        load_orbax(folder)
    (folder / "tensors.json").write_text("{}")
    with pytest.raises(CheckpointError, match="lists no tensor names"):
        load_orbax(folder)
    with pytest.raises(CheckpointError, match="not a model in Orbax form"):
        load_orbax(tmp_path / "in")


def test_names_without_their_prefix_come_back_without_it(tmp_path: Path) -> None:
    written(tmp_path / "in", "gpt2", "float32")
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    bare = {name.removeprefix("transformer."): array for name, array in tensors.items()}
    assert bare.keys() != tensors.keys()
    save_file(bare, tmp_path / "in" / "model.safetensors")
    model, params = load_model(tmp_path / "in")
    assert same_bytes(save_model(model, params, tmp_path / "out"), bare)
    again = load_orbax(save_orbax(model, params, tmp_path / "orbax"))
    assert same_bytes(save_model(*again, tmp_path / "again"), bare)


def merged(*folders: Path, operator: str, mesh: Any, **parameters: Any) -> tuple[Any, Any, str]:
    """The base's, the merged and the compiled form of a few parameters of every kind of sharding."""
    loaded = [load_model(folder, mesh=mesh)[1] for folder in folders]
    base, first, second = (
        {"embed": p["embed"], "attn": p["blocks_0"]["attn"]["q"], "mlp": p["blocks_1"]["mlp"]["down"]}
        for p in loaded
    )
    merge = OPERATORS[operator](**parameters)
    run = jax.jit(lambda b, x, y: merge([x, y], base=b))
    return base, run(base, first, second), run.lower(base, first, second).compile().as_text()


def test_merges_of_loaded_models_stay_on_their_devices(tmp_path: Path) -> None:
    folders = [tmp_path / n for n in ("base", "first", "second")]
    for n, folder in enumerate(folders):
        tensors = written(folder, "llama", "float32")
        rng = np.random.default_rng(n)
        moved = {
            k: a + np.float32(n * 0.01) * rng.normal(size=a.shape).astype(np.float32)
            for k, a in tensors.items()
        }
        save_file(moved, folder / "model.safetensors")
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    cases: dict[str, dict[str, Any]] = {
        "task_arithmetic": {"weight": [0.5, 0.3]},
        "ties": {"weight": [0.5, 0.3], "density": [0.4, 0.4]},
    }
    for operator, parameters in cases.items():
        base, there, program = merged(*folders, operator=operator, mesh=mesh, **parameters)
        _, here, _ = merged(*folders, operator=operator, mesh=None, **parameters)
        for path, leaf in jax.tree.leaves_with_path(there):
            original = base
            for key in path:
                original = original[key.key]
            assert leaf.sharding.is_equivalent_to(original.sharding, leaf.ndim), path
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-6), there, here
        )
        assert "all-gather" not in program, operator
    gathered = jax.jit(lambda x: jax.lax.with_sharding_constraint(x, jax.NamedSharding(mesh, jax.P())))
    kernel = base["attn"]["kernel"]
    assert "all-gather" in gathered.lower(kernel).compile().as_text()
