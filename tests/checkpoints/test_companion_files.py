"""What a model made of a folder takes along: copied to the byte, or named in a warning; code never."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from mergelab.checkpoints.companion_files import companion_warnings, donor_files
from mergelab.checkpoints.model_files import put_file
from mergelab.cli.main import cli
from mergelab.errors import CheckpointError
from mergelab.merging import Recipe, merge, plan_merge
from tests.merging.recipes import write_model

COPIED = [
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "qwen.tiktoken",
    "tiktoken.model",
    "source.spm",
    "target.spm",
    "spiece.model",
    "vocab.bpe",
    "normalizer.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "USE_POLICY.md",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "modules.json",
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "2_Dense/model.safetensors",
]
CODE = ["tokenization_qwen.py", "modeling_x.py", "configuration_x.py"]
UNKNOWN = ["labels.json", "prompts.txt"]
SILENT = [
    "README.md",
    ".gitattributes",
    "training_args.bin",
    "trainer_state.json",
    "tf_model.h5",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "mergelab.json",
    "eval_results.json",
    "onnx/model.onnx",
    "additional_chat_templates/x.txt",
    "1_Pooling/__init__.py",
    "figure.png",
]
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
]


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(MODULES) if name == "modules.json" else f"of {name}")
    return folder


def test_every_file_is_copied_named_or_of_no_use(tmp_path: Path) -> None:
    folder = fill(tmp_path, *COPIED, *CODE, *UNKNOWN, *SILENT, "config.json")
    files = donor_files(folder, None)
    assert sorted(files) == sorted(COPIED)
    assert all(content == (folder / name).read_bytes() for name, content in files.items())
    code, unknown, dense = companion_warnings(folder, files)
    assert "code is not copied (configuration_x.py, modeling_x.py, tokenization_qwen.py)" in code
    assert "no use for it is known: labels.json, prompts.txt" in unknown
    assert "2_Dense/model.safetensors is copied as it is: layers in 2_Dense/ are not merged" in dense


def test_a_merged_tokenizer_takes_the_place_of_all_that_the_donor_has(tmp_path: Path) -> None:
    files = donor_files(fill(tmp_path, *COPIED), {"tokenizer.json": b"merged"})
    assert files["tokenizer.json"] == b"merged"
    stale = {
        "tokenizer.model",
        "tokenizer.model.v3",
        "qwen.tiktoken",
        "tiktoken.model",
        "source.spm",
        "target.spm",
    }
    assert (
        not stale & files.keys()
        and {"LICENSE", "1_Pooling/config.json", "chat_template.jinja"} <= files.keys()
    )
    assert len(companion_warnings(tmp_path, files)) == 1


@pytest.mark.parametrize("place", ["../outside", "/etc", "a/b", ".."])
def test_modules_outside_the_folder_are_refused(place: str, tmp_path: Path) -> None:
    module = {"path": place, "type": "sentence_transformers.models.Pooling"}
    (tmp_path / "modules.json").write_text(json.dumps([module]))
    with pytest.raises(CheckpointError, match=r"modules.json gives the file name .*not one plain name"):
        donor_files(tmp_path, None)


def test_a_module_of_strange_code_is_named(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(json.dumps([{"path": "1_X", "type": "my_code.Pooling"}]))
    (warning,) = companion_warnings(tmp_path, donor_files(tmp_path, None))
    assert "runs 'my_code.Pooling' in 1_X/, code that is not copied" in warning
    (tmp_path / "modules.json").write_text(json.dumps([{"path": "pool", "type": "sentence_transformers.X"}]))
    assert "pool/ is not copied" in companion_warnings(tmp_path, donor_files(tmp_path, None))[0]
    (tmp_path / "modules.json").write_text(json.dumps([{"path": 1}]))
    with pytest.raises(CheckpointError, match="lists a module without a path or a type"):
        donor_files(tmp_path, None)


def test_a_pointer_in_place_of_a_vocabulary_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )
    with pytest.raises(CheckpointError, match=r"tokenizer.model is a Git LFS pointer.*`git lfs pull`"):
        donor_files(tmp_path, None)


def test_a_file_is_put_into_the_folder_or_one_in_it_and_nowhere_else(tmp_path: Path) -> None:
    put_file(tmp_path, "1_A/b.json", b"x")
    put_file(tmp_path, "c.json", tmp_path / "1_A" / "b.json")
    assert (tmp_path / "1_A" / "b.json").read_bytes() == (tmp_path / "c.json").read_bytes() == b"x"
    for name in ("../x", "/x", "a/b", "1_A/b/c", "1_A//b", "", "1_A/.."):
        with pytest.raises(CheckpointError):
            put_file(tmp_path, name, b"x")
    assert sorted(os.listdir(tmp_path)) == ["1_A", "c.json"]


def test_a_merge_takes_the_donors_files_along_and_warns_of_the_rest(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        fill(write_model(tmp_path / name, seed=seed), *COPIED, "tokenization_x.py")
        (tmp_path / name / "2_Dense" / "model.safetensors").unlink()
        save_file(
            {"linear.weight": np.ones((2, 2), np.float32)}, tmp_path / name / "2_Dense" / "model.safetensors"
        )
        (tmp_path / name / "LICENSE").write_text(f"license of {name}")
        for file in ("tokenizer.json", "tokenizer.model", "spiece.model"):
            (tmp_path / name / file).unlink()
    recipe = Recipe(merge_method="linear", models=[{"model": "a"}, {"model": "b"}], parameters={"weight": 1})
    plan = plan_merge(recipe, base_dir=tmp_path)
    words = ["tokenization_x.py", "layers in 2_Dense/ are not merged", "license files of model 'b'"]
    assert all(any(word in warning for warning in plan.warnings) for word in words)
    out = merge(plan, tmp_path / "out").out
    assert load_file(out / "2_Dense" / "model.safetensors").keys() == {"linear.weight"}
    assert (out / "1_Pooling" / "config.json").read_text() == "of 1_Pooling/config.json"
    assert (out / "LICENSE").read_text() == "license of a" and not (out / "tokenization_x.py").exists()
    again = merge(plan, tmp_path / "out", overwrite=True).out
    assert (again / "additional_chat_templates" / "tool_use.jinja").is_file()


def test_convert_takes_them_along_and_warns_too(small_goldens: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    for file in (small_goldens / "models" / "llama-base").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    fill(source, "1_Pooling/config.json", "modules.json", "NOTICE", "modeling_x.py")
    result = CliRunner().invoke(cli, ["convert", str(source), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "warning: " in result.stderr and "code is not copied (modeling_x.py)" in result.stderr
    assert (tmp_path / "out" / "1_Pooling" / "config.json").is_file()
    assert (tmp_path / "out" / "NOTICE").is_file() and not (tmp_path / "out" / "modeling_x.py").exists()
