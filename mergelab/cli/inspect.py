"""`mergelab inspect`: what a model folder holds and what it takes, from headers alone."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergelab.aot.chips import Fit, chip_of, device_count, is_one_chip
from mergelab.cli.numbers import WholeNumber
from mergelab.cli.options import MESH, readable

if TYPE_CHECKING:
    from mergelab.checkpoints import TensorSource
    from mergelab.models.footprint import Inventory
    from mergelab.models.model import Model
    from mergelab.sae.training.config import TrainConfig

__all__ = ["command"]

_DTYPES = ("bfloat16", "float16", "float32")


@click.command("inspect")
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--mesh", type=MESH, metavar="AXES", help="Mesh whose memory per device to show: data=2,tensor=8."
)
@click.option(
    "--topology",
    metavar="NAME",
    help="TPU slice or number of GPUs to compile for, which you need not have: v5e:4x4, v5e, h100:8.",
)
@click.option(
    "--sae",
    type=click.Path(path_type=Path),
    metavar="CONFIG",
    help="Training of an SAE that is to fit on the chips of --topology with the model.",
)
@click.option("--dtype", type=click.Choice(_DTYPES), help="Dtype on the devices (default: as stored).")
@click.option("--batch", type=WholeNumber(1), default=None, help="Number of sequences over the whole mesh.")
@click.option("--length", type=WholeNumber(1), help="Tokens in a sequence, for the cache or the pass.")
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Text whose tokens to count, in place of the tensors: bytes in each, numbers, whitespace, bytes.",
)
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="MODEL",
    help="Second model, whose tokens of --text are shown side by side.",
)
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--sites", is_flag=True, help="List the named sites with their shapes.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def command(
    path: Path,
    mesh: dict[str, int] | None,
    topology: str | None,
    sae: Path | None,
    dtype: str | None,
    batch: int | None,
    length: int | None,
    text: Path | None,
    against: Path | None,
    tensors: bool,
    sites: bool,
    as_json: bool,
) -> None:
    """Show what the model or LoRA adapter in PATH holds, reading its headers and its config only.

    With --mesh, the bytes each device would hold; with --length, of a key-value cache too. With --topology,
    the forward pass is compiled for it (extra: tpu-aot or cuda12): bytes, floating-point operations and
    exchanges of each chip, and whether it fits; with --sae, beside the training step of an SAE. With --text,
    how the model's tokenizer cuts a text. No weights are read and no accelerator is needed.

    \b
    Examples:
      mergelab inspect model
      mergelab inspect model --sites
      mergelab inspect adapter
      mergelab inspect model --mesh data=1,tensor=8 --dtype bfloat16 --batch 4 --length 4096
      mergelab inspect model --topology v5e:4x4 --mesh data=2,tensor=8
      mergelab inspect model --topology v5e --sae sae.yaml
      mergelab inspect model --text prose.txt --against other
    """
    if text is not None:
        if mesh or topology or sae or tensors or sites:
            raise click.UsageError("--text looks at the tokenizer alone; ask for the rest in another call")
        from mergelab.cli.inspect_text import show_segmentations

        show_segmentations(text, [path] if against is None else [path, against], as_json=as_json)
        return
    if against is not None:
        raise click.UsageError("--against compares the tokens of a text; give one with --text")
    from mergelab.checkpoints.adapter_factors import is_adapter
    from mergelab.checkpoints.locations import location_text
    from mergelab.errors import CheckpointError
    from mergelab.models.footprint import take_inventory

    if is_adapter(path) and not (path / "config.json").exists():
        if mesh or topology or sae or sites:
            raise click.UsageError(f"{path} is an adapter without its model; inspect its base")
        from mergelab.cli.inspect_adapter import adapter_lines, describe_adapter

        report = describe_adapter(path)
        lines = [*adapter_lines(report), "", "tensors", *_tensor_lines(report, tensors)]
        click.echo(json.dumps(report, indent=2) if as_json else "\n".join(lines))
        return
    inventory = take_inventory(path)
    if (mesh or topology) and (inventory.model is None or inventory.faults):
        raise CheckpointError(inventory.faults[0])
    if sae and not topology:
        raise click.UsageError("say with --topology on which chips the SAE is to fit: v5e is one of them")
    if topology and mesh is None and is_one_chip(topology):
        mesh = {"data": 1}
    if topology and mesh is None:
        share = f"tensor={device_count(topology)}"
        raise click.UsageError(f"say with --mesh how the chips of the topology share the work: {share}")
    report = _describe(inventory)
    if not path.exists():
        report["path"] = location_text(path)
    if mesh is not None and topology is None and inventory.model is not None:
        report["footprint"] = _footprint(inventory, mesh, dtype, batch or 1, length or 0)
    if mesh is not None and topology is not None and inventory.model is not None:
        report["compiled"] = _compile(inventory.model, topology, mesh, dtype, batch, length, sae)
    click.echo(json.dumps(report, indent=2) if as_json else _text(report, tensors, sites))


def _describe(inventory: Inventory) -> dict[str, Any]:
    """The report without its mesh, as plain data."""
    model, checkpoint = inventory.model, inventory.checkpoint
    found = checkpoint.tensors.items()
    return {
        "path": str(checkpoint.path),
        "model_type": checkpoint.config.get("model_type"),
        "runs_here": model is not None and not inventory.faults,
        "faults": list(inventory.faults),
        "parameters": inventory.parameters,
        "bytes": sum(inventory.stored.values()),
        "dtypes": dict(inventory.stored),
        "files": [file.file.path.name for file in checkpoint.files],
        "config": {} if model is None else _plain(_config(model.config)),
        "tensors": {
            name: {"dtype": str(t.dtype), "shape": list(t.shape), **_stored_form(t)} for name, t in found
        },
        "sites": {} if model is None else {name: list(shape) for name, shape in model.sites().items()},
    }


def _stored_form(tensor: TensorSource) -> dict[str, str]:
    """How a tensor is quantized, in words; nothing where it is not."""
    from mergelab.checkpoints.gguf.tensors import GgufTensor
    from mergelab.checkpoints.quantized import BoxSource

    form = tensor.form if isinstance(tensor, BoxSource | GgufTensor) else None
    return {} if form is None else {"stored": form}


def _config(config: Any) -> dict[str, Any]:
    """The settings of a model under the keys that this command has always printed."""
    found = {
        ("width" if key == "d_model" else key): value for key, value in dataclasses.asdict(config).items()
    }
    for ours, printed in (("n_layers", "layers"), ("n_heads", "heads"), ("n_kv_heads", "kv_heads")):
        found.pop(ours, None)
        if hasattr(config, ours):
            found[printed] = getattr(config, ours)
    blocks = found.pop("blocks", None)
    if blocks is None:
        return found
    found |= {"head_dim": config.head_dim, "mlp_width": config.mlp_width}
    first = blocks[0]
    if config.recurrent:
        return found | {"recurrent": list(config.recurrent)}
    if not all(isinstance(first.get(part), dict) for part in ("attention", "mlp")):
        return found
    attention, mlp = first["attention"], first["mlp"]
    learned = found.pop("learned_positions", True)
    experts = {"count": mlp["count"], "chosen": mlp["chosen"]} if "count" in mlp else None
    return found | {
        "rotary": [] if learned else [block["attention"]["rotary"] for block in blocks],
        "windows": [block["attention"]["window"] for block in blocks],
        "query_scale": attention["scale"],
        "block": "sequential" if first["placement"] == "pre" else first["placement"],
        "qkv_bias": attention.get("qkv_bias", attention.get("bias")),
        "out_bias": attention.get("out_bias", attention.get("bias")),
        "mlp_bias": mlp.get("bias", False),
        "qk_norm": attention.get("qk_norm"),
        "attention_cap": attention.get("cap"),
        "activation": mlp["activation"],
        "gated": mlp.get("gated", True),
        "experts": experts,
    }


def _plain(value: Any) -> Any:
    """Nested settings as JSON can hold them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _footprint(
    inventory: Inventory, mesh: dict[str, int], dtype: str | None, batch: int, length: int
) -> dict[str, Any]:
    from mergelab.checkpoints import dtype_from_name
    from mergelab.models.footprint import footprint
    from mergelab.sharding import MODEL_AXES, fill_sizes

    assert inventory.model is not None
    wanted = None if dtype is None else dtype_from_name(dtype)
    if -1 in mesh.values():  # the rest of the devices of this machine, as for any other command
        import jax

        mesh = fill_sizes(mesh, jax.device_count(), axes=MODEL_AXES)
    found = footprint(
        inventory.model,
        mesh,
        lambda leaf: wanted or inventory.dtype_of(leaf),
        batch=batch,
        cache_length=length,
    )
    return dataclasses.asdict(found)


def _compile(
    model: Model,
    topology: str,
    mesh: dict[str, int],
    dtype: str | None,
    batch: int | None,
    length: int | None,
    sae: Path | None,
) -> dict[str, Any]:
    from mergelab.models.footprint import compile_forward, smallest_for_pass
    from mergelab.sharding import MODEL_AXES, fill_sizes

    place = f"chips of {topology}"
    mesh = fill_sizes(mesh, device_count(topology), axes=MODEL_AXES, all_of_them=True, place=place)
    settings = None if sae is None else _training(sae, model)
    if settings is not None:  # the pass that fills one batch of the training
        length = length or settings.data.context
        batch = batch or -(-settings.train.batch_size // length)
    pass_: dict[str, Any] = {
        "batch": batch or mesh.get("data", 1) * mesh.get("fsdp", 1),
        "length": length or min(2048, model.config.max_length),
        "dtype": dtype or "bfloat16",
    }
    report = compile_forward(model, topology, mesh, **pass_)
    found = {
        "topology": topology,
        "mesh": mesh,
        **pass_,
        **dataclasses.asdict(report),
        "peak": report.peak,
    }
    # Weights and the training's state stay; the pass and the step take their turns with the rest.
    needed, passing = report.arguments, report.peak - report.arguments
    if settings is not None:
        from mergelab.sae.training.aot import plan_step

        plan = plan_step(settings, topology, settings.mesh or {"data": 1, "latents": report.chips})
        needed += plan.report.arguments
        passing = max(passing, plan.report.peak - plan.report.arguments)
        found["sae"] = {"parameters": plan.parameters, "peak": plan.report.peak}
    chip = chip_of(topology)
    fit = Fit(needed + passing, chip.memory, chip.usable)
    found["fit"] = {"needed": fit.needed, "memory": fit.memory, "sentence": str(fit)}
    if report.fits:
        return found

    def tell(line: str) -> None:
        click.echo(line, err=True)

    smallest = smallest_for_pass(model, topology, **pass_, known=report, tell=tell)
    found["smallest"] = smallest and {
        "topology": smallest.topology,
        "mesh": dict(smallest.mesh),
        "peak": smallest.report.peak,
        "memory": chip.memory,
    }
    return found


def _training(config: Path, model: Model) -> TrainConfig:
    """A training's configuration; the width of its activations is the model's where it names none."""
    from mergelab.sae.training.config import load_config

    settings = load_config(config)
    if settings.sae.d_in is not None:
        return settings
    return load_config(config, [f"sae.d_in={model.config.d_model}"])


def _text(report: Mapping[str, Any], tensors: bool, sites: bool) -> str:
    kinds = ", ".join(f"{kind} {readable(size)}" for kind, size in report["dtypes"].items())
    runs = "" if report["runs_here"] else " (cannot be run here)"
    rows = {
        "path": report["path"],
        "family": f"{report['model_type'] or 'unknown'}{runs}",
        "parameters": f"{report['parameters']:,} in {len(report['tensors'])} tensors",
        "stored": f"{kinds}, in {len(report['files'])} file{'s' * (len(report['files']) > 1)}",
    }
    if config := report["config"]:
        read = f"{config['vocab_size']:,} tokens" if "vocab_size" in config else f"images {config['image']}"
        rows["shape"] = (
            f"{config['layers']} layers of width {config['width']}, {config['heads']} heads, "
            f"{config['mlp_width']} neurons, {read}"
        )
        if recurrent := config.get("recurrent"):
            rows["recurrent"] = f"{len(recurrent)} of the {config['layers']} layers"
    lines = [f"{name:<10} {value}" for name, value in rows.items()]
    lines += [f"{'fault':<10} {fault}" for fault in report["faults"]]
    lines += ["", "tensors", *_tensor_lines(report, tensors)]
    if sites:
        shapes = {name: f"[{', '.join(map(str, shape))}]" for name, shape in report["sites"].items()}
        lines += ["", "sites", *_grouped(shapes)]
    if "footprint" in report:
        lines += ["", *_footprint_lines(report["footprint"])]
    if "compiled" in report:
        lines += ["", *_compiled_lines(report["compiled"])]
    return "\n".join(lines)


def _tensor_lines(report: Mapping[str, Any], each: bool) -> Iterable[str]:
    """The tensors, one by one or those alike together."""
    described = {name: _in_words(tensor) for name, tensor in report["tensors"].items()}
    return [f"  {name}  {words}" for name, words in described.items()] if each else _grouped(described)


def _in_words(tensor: Mapping[str, Any]) -> str:
    stored = f", stored as {tensor['stored']}" if "stored" in tensor else ""
    return f"{tensor['dtype']} {tensor['shape']}{stored}"


def _grouped(described: Mapping[str, str]) -> Iterable[str]:
    """One line for all names that differ only in their numbers and are described alike."""
    groups: dict[tuple[str, str], int] = {}
    for name, description in described.items():
        key = (re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), description)
        groups[key] = groups.get(key, 0) + 1
    width = max(len(name) for name, _ in groups)
    for (name, description), count in groups.items():
        yield f"  {name:<{width}}  {description}" + (f"  x {count}" if count > 1 else "")


def _axes(mesh: Mapping[str, int]) -> str:
    return ",".join(f"{name}={size}" for name, size in mesh.items())


def _footprint_lines(found: Mapping[str, Any]) -> list[str]:
    devices = math.prod(found["mesh"].values())
    lines = [
        f"on each of the {devices} devices of {_axes(found['mesh'])}",
        f"  parameters {readable(found['parameters'])} of {readable(found['total'])} "
        f"({readable(found['whole'])} on every device in full)",
    ]
    if found["cache"]:
        total = found["parameters"] + found["cache"]
        lines += [f"  cache      {readable(found['cache'])}", f"  together   {readable(total)}"]
    return lines


def _compiled_lines(found: Mapping[str, Any]) -> list[str]:
    from mergelab.sharding import shown_sizes

    compiled = found["seconds"] > 0
    lines = [
        f"one forward pass of {found['batch']} x {found['length']} tokens in {found['dtype']}, on each of "
        f"the {found['chips']} chips ({found['device']}) of {found['topology']} as {_axes(found['mesh'])}",
        f"  arguments   {readable(found['arguments'])}",
        f"  outputs     {readable(found['outputs']) if found['fits'] else 'not known'}",
        f"  temporaries {readable(found['temporaries']) if compiled else 'not compiled: no room for them'}",
        f"  together    {readable(found['peak'])}",
    ]
    if found["fits"]:
        lines.append(f"  operations  {found['flops']:.3g} floating-point{_precision(found)}")
    if sae := found.get("sae"):
        lines.append(f"  SAE step    {readable(sae['peak'])} with {sae['parameters']:,} parameters")
    for exchange in found["collectives"]:
        lines.append(f"  {exchange['kind']:<18} {exchange['count']} x, {readable(exchange['nbytes'])} in all")
    what = "model, SAE and batch" if "sae" in found else "model and batch"
    lines += [f"{fit['sentence']} ({what})"] if (fit := found.get("fit")) else []
    if found["fits"]:
        return [*lines, f"compiled in {found['seconds']:.1f} s; memory and exchanges, not speed"]
    kind = found["topology"].partition(":")[0]
    if (smallest := found["smallest"]) is None:
        return [*lines, f"no slice of {kind} was found that holds it; take a smaller batch or length"]
    return [
        *lines,
        f"the smallest slice of {kind} that holds it: --topology {smallest['topology']} --mesh "
        f"{shown_sizes(smallest['mesh'])} ({readable(smallest['peak'])} on each chip, compiled)",
    ]


def _precision(found: Mapping[str, Any]) -> str:
    if not found["float32"]:
        return ""
    return (
        f", of products {found['float32']:.0%} float32, on average in {found['passes']:.2g} bfloat16 passes"
    )
