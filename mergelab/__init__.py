"""The weights and the features of transformers, in JAX: `import mergelab as ml`.

Models; a place is a folder, a GGUF file, a hub id, org/name[@revision][:subfolder], a URL such as
gs://bucket/model, an adapter, or a recipe that is merged while it is loaded
    load_model(place), save_model(model, params, folder, tokenizer=...), Model, model_from_config
    stream(place)                                           the same, its weights left in their files
    load_tokenizer(place), Tokenizer
    generate(model, params, tokenizer, text)                text in, text out
    finetune(model, params, tokenizer, text, lora=16)       further training; params, record
    push(folder, "org/name")                                upload a model, adapter, SAE or file to the hub
    make_mesh({"data": 2, "tensor": 4})                     devices to spread a model over

Activations
    capture(model, params, tokens, ["blocks.3.resid_post"]) what sites hold, by name (model.sites())

Merging
    merge(recipe, folder), load_recipe(file), Recipe        mergekit's recipes, streamed from disk to disk
    plan_merge(recipe)                                      what a merge would read, compute and write
    open_merge(recipe)                                      the merge as a model that is never written
    check_recipe(recipe), diff_models(a, b)                 what makes a merge meaningless; how models differ
    operators                                               the same operators, on pytrees
    explain_merge(recipe, sae, text, folder)                what it did to the parents, in latents of an SAE
    soup(candidates), extract_lora(finetuned, base, folder)

Verdicts
    evaluate_model(place, text=..., tasks=...)              bits per byte, accuracy, answers, with intervals
    compare_models([place, place], text=...)                several models, and their paired differences
    solve(place, tasks=..., method="vote", out=folder)      accuracy against compute: samples, votes, searches

Sparse autoencoders
    SAE, load_sae(folder), save_sae(sae, folder)            files of six libraries
    train_sae(activations, n_latents=..., k=...)            on an array, or as a configuration says
    evaluate_sae(sae, activations), evaluate_sae(sae, model, params, tokenizer, text)
    latent_table(sae, model_folder, prompts)                what latents do on prompts, as data and figure

Edits and readings; edits go to `model.apply(params, tokens, edit={site: ...})` and `generate(edit=...)`
    steer(direction, strength), steering_vector             add a direction
    save_steering(vector, file), load_steering(file)        as llama.cpp's control vectors
    ablate(sae, latents), ablate(direction)                 remove latents or a direction
    patch(value)                                            put another prompt's activation in place
    logit_lens(model, params, tokens)                       what every layer already predicts
    trace_decision(a, b, prompts, tokens)                   why one model stops where another goes on
    abliterate(model_folder, out, harmful, harmless)        a direction removed from the weights

Errors
    errors.MergelabError                                    base of every error raised on purpose

Rooms, each with more names
    models, text, decoding, activations, operators, merging, tuning, verdict, explain, reasoning, checkpoints,
    sae, interp, abliteration, report, quickstart, aot, processes; sharding, trees

Names load when they are first used, so that the import itself takes no time. docs/coming_from.md lists what
other libraries call these things.
"""

from __future__ import annotations

from mergelab.lazy import lazy_names
from mergelab.version import __version__

TYPE_CHECKING = False  # that of `typing`, which takes longer to import than all the rest
if TYPE_CHECKING:
    from mergelab import (
        abliteration,
        activations,
        aot,
        checkpoints,
        decoding,
        errors,
        explain,
        interp,
        merging,
        models,
        operators,
        processes,
        quickstart,
        reasoning,
        report,
        sae,
        sharding,
        text,
        trees,
        tuning,
        verdict,
    )
    from mergelab.abliteration import abliterate
    from mergelab.activations import capture
    from mergelab.checkpoints import push
    from mergelab.decoding import generate_text as generate
    from mergelab.explain import explain_merge
    from mergelab.interp import (
        ablate,
        load_steering,
        logit_lens,
        patch,
        save_steering,
        steer,
        steering_vector,
    )
    from mergelab.merging import (
        Recipe,
        check_recipe,
        diff_models,
        extract_lora,
        load_model,
        load_recipe,
        load_tokenizer,
        merge,
        open_merge,
        plan_merge,
        soup,
        stream,
    )
    from mergelab.models import Model, model_from_config, save_model
    from mergelab.reasoning import solve, trace_decision
    from mergelab.sae import SAE, evaluate_sae, latent_table, load_sae, save_sae, train_sae
    from mergelab.sharding import make_mesh
    from mergelab.text import Tokenizer
    from mergelab.tuning import finetune
    from mergelab.verdict import compare_models, evaluate_model

__all__ = [
    "SAE",
    "Model",
    "Recipe",
    "Tokenizer",
    "__version__",
    "ablate",
    "abliterate",
    "abliteration",
    "activations",
    "aot",
    "capture",
    "check_recipe",
    "checkpoints",
    "compare_models",
    "decoding",
    "diff_models",
    "errors",
    "evaluate_model",
    "evaluate_sae",
    "explain",
    "explain_merge",
    "extract_lora",
    "finetune",
    "generate",
    "interp",
    "latent_table",
    "load_model",
    "load_recipe",
    "load_sae",
    "load_steering",
    "load_tokenizer",
    "logit_lens",
    "make_mesh",
    "merge",
    "merging",
    "model_from_config",
    "models",
    "open_merge",
    "operators",
    "patch",
    "plan_merge",
    "processes",
    "push",
    "quickstart",
    "reasoning",
    "report",
    "sae",
    "save_model",
    "save_sae",
    "save_steering",
    "sharding",
    "solve",
    "soup",
    "steer",
    "steering_vector",
    "stream",
    "text",
    "trace_decision",
    "train_sae",
    "trees",
    "tuning",
    "verdict",
]

__getattr__, __dir__ = lazy_names(__name__)
