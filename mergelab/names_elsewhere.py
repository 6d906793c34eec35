"""What other libraries call things, and what mergelab calls them: the hints of `AttributeError`s.

[docs/coming_from.md](../docs/coming_from.md) shows the same table, with examples.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["NAMES", "ForeignName", "advice"]


@dataclass(frozen=True)
class ForeignName:
    """A name of another library.

    Attributes:
        library: the library, as a heading of the page.
        theirs: how it is written there, such as `SAE.from_pretrained`.
        ours: an expression of mergelab that does the same, with `ml` for the package.
    """

    library: str
    theirs: str
    ours: str


def _names(library: str, table: dict[str, str]) -> tuple[ForeignName, ...]:
    return tuple(ForeignName(library, theirs, ours) for theirs, ours in table.items())


NAMES: tuple[ForeignName, ...] = (
    *_names(
        "TransformerLens",
        {
            "HookedTransformer": "model, params = ml.load_model(folder)",
            "HookedEncoder": "model, params = ml.load_model(folder)",
            "HookedTransformer.from_pretrained": "model, params = ml.load_model(folder)",
            "run_with_cache": "ml.capture(model, params, tokens, ['blocks.3.resid_post'])",
            "run_with_hooks": "model.apply(params, tokens, edit={site: function})",
            "add_hook": "model.apply(params, tokens, edit={site: function})",
            "ActivationCache": "ml.capture(model, params, tokens, sites)",
            "HookPoint": "model.sites()",
            "hook_dict": "model.sites()",
            "get_act_name": "model.sites()",
            "cfg": "model.config",
            "to_tokens": "ml.load_tokenizer(folder).encode(text)",
            "to_string": "ml.load_tokenizer(folder).decode(ids)",
            "get_act_patch_resid_pre": "ml.interp.patch_grid(model, params, source, target, sites, metric)",
            "activation_patching": "ml.interp.patch_grid(model, params, source, target, sites, metric)",
            "direct_path_patching": "ml.interp.path_patching(...)",
            "logit_attrs": "ml.interp.direct_logit_attribution(...)",
            "logits_to_logit_diff": "ml.interp.logit_difference(right, wrong)",
        },
    ),
    *_names(
        "SAELens",
        {
            "SAE.from_pretrained": "ml.load_sae(release, sae_id)",
            "SAE.load_from_disk": "ml.load_sae(folder)",
            "SAE.load_from_pretrained": "ml.load_sae(folder)",
            "save_model_sae": "ml.save_sae(sae, folder)",
            "HookedSAETransformer": "model.apply(params, tokens, edit={site: ml.interp.splice(sae)})",
            "TrainingSAE": "ml.train_sae(rows, n_latents=..., k=..., tokens=...)",
            "StandardSAE": "ml.train_sae(rows, variant='relu', n_latents=..., tokens=...)",
            "TopKSAE": "ml.train_sae(rows, variant='topk', n_latents=..., k=..., tokens=...)",
            "SAETrainer": "ml.train_sae(rows, n_latents=..., k=..., tokens=...)",
            "SAETrainingRunner": "ml.train_sae(config, out=folder)",
            "LanguageModelSAERunnerConfig": "ml.train_sae(config, out=folder)",
            "ActivationsStore": "ml.activations.open_model_activations(folder, sites, texts)",
            "run_evals": "ml.evaluate_sae(sae, model, params, tokenizer, text)",
        },
    ),
    *_names(
        "dictionary_learning",
        {
            "Dictionary": "ml.SAE",
            "AutoEncoder": "ml.SAE",
            "AutoEncoder.from_pretrained": "ml.load_sae(folder)",
            "load_dictionary": "ml.load_sae(folder)",
            "save_dictionary": "ml.save_sae(sae, folder)",
            "trainSAE": "ml.train_sae(rows, n_latents=..., k=..., tokens=...)",
            "ActivationBuffer": "ml.activations.open_model_activations(folder, sites, texts)",
        },
    ),
    *_names(
        "mergekit",
        {
            "run_merge": "ml.merge(ml.load_recipe('recipe.yaml'), out)",
            "MergeConfiguration": "ml.Recipe",
            "MergeConfiguration.model_validate": "ml.load_recipe('recipe.yaml')",
            "MergeOptions": "ml.merge(recipe, out, memory=..., seed=...)",
            "Recipe.load": "ml.load_recipe('recipe.yaml')",
            "Recipe.parse": "ml.merging.parse_recipe(text)",
            "Recipe.from_yaml": "ml.load_recipe('recipe.yaml')",
            "to_yaml": "ml.merging.recipe_yaml(recipe)",
            "MergePlanner": "ml.plan_merge(recipe)",
            "make_plan": "ml.plan_merge(recipe)",
            "merge_methods": "ml.operators",
            "MergeMethod": "ml.operators.OPERATORS",
            "mergekit_extract_lora": "ml.extract_lora(finetuned, base, out, rank=16)",
            "model_soup": "ml.soup(folders, out=folder)",
            "evolve": "ml.merging.soups.greedy_soup(candidates, evaluate)",
        },
    ),
    *_names(
        "transformers",
        {
            "from_pretrained": "model, params = ml.load_model(folder)",
            "AutoModelForCausalLM": "model, params = ml.load_model(folder)",
            "AutoModel": "model, params = ml.load_model(folder)",
            "AutoTokenizer": "ml.load_tokenizer(folder)",
            "AutoConfig": "ml.models.model_from_config(config)",
            "save_pretrained": "ml.save_model(model, params, folder, tokenizer=tokenizer)",
            "pipeline": "ml.generate(model, params, tokenizer, text, max_new_tokens=32)",
            "Trainer": "ml.finetune(model, params, tokenizer, text)",
            "TrainingArguments": "ml.tuning.TuningSettings",
            "SFTTrainer": "ml.finetune(model, params, tokenizer, conversations)",
            "get_peft_model": "ml.finetune(model, params, tokenizer, text, lora=16)",
        },
    ),
    *_names(
        "nnsight",
        {
            "LanguageModel": "model, params = ml.load_model(folder)",
            "NNsight": "model, params = ml.load_model(folder)",
            "trace": "model.apply(params, tokens, capture=sites, edit={site: function})",
            "invoke": "model.apply(params, tokens, capture=sites, edit={site: function})",
        },
    ),
    *_names(
        "penzai",
        {
            "llama_from_huggingface_model": "model, params = ml.load_model(folder)",
            "TransformerLM": "model, params = ml.load_model(folder)",
            "select": "model.apply(params, tokens, capture=sites, edit={site: function})",
            "KnockOutAttentionHeads": "model.apply(params, tokens, edit={'blocks.0.attn.z': function})",
            "RewireComputationPaths": "ml.interp.path_patching(...)",
            "saving_all_intermediates": "ml.capture(model, params, tokens, sites)",
            "SaveIntermediate": "ml.capture(model, params, tokens, sites)",
        },
    ),
    *_names(
        "optax and flax",
        {
            "chain": "ml.operators.chain",
            "init": "model.init(seed)",
            "apply": "model.apply(params, tokens)",
            "Mesh": "ml.make_mesh({'data': 2, 'tensor': 4})",
        },
    ),
)
"""Names of other libraries, by library."""


def advice(name: str, owner: str = "") -> str:
    """What to write instead of another library's name, as the end of an error's sentence.

    Args:
        name: what was asked for.
        owner: the class it was asked of, such as `Recipe`; "" for a module.

    Returns:
        `"; write ml.load_sae(folder), where ml is mergelab"`, or `""` for a name of no library.
    """
    for foreign in NAMES:
        parent, _, last = foreign.theirs.rpartition(".")
        if last == name and (not owner or parent in ("", owner)):
            return f"; write {foreign.ours}, where ml is mergelab"
    return ""
