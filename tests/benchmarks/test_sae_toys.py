"""The benchmark on toy truths that nothing was tuned on: its page says what misses its aim."""

from __future__ import annotations

from benchmarks.sae_presets import PRESETS
from benchmarks.sae_toys import FACTORS, SETTINGS, TOYS, page
from mergelab.sae.training.config import TrainingRecipe
from mergelab.sae.variants import make_variant


def _run(nmse: float, dead: float = 0.0, cosine: float = 0.99) -> dict[str, float]:
    figures = {"nmse": nmse, "dead": dead, "mean_max_cosine": cosine, "above": 1.0, "l0": 8.0}
    return figures | {"learning_rate": 1e-3, "cpu_seconds": 20.0}


def test_what_misses_its_aim_is_bold() -> None:
    default, lift = list(SETTINGS)[:2]
    runs = {
        f"plain|0|{default}|1": _run(0.1, dead=0.002),
        f"plain|1|{default}|1": _run(0.2, cosine=0.98),
        f"plain|0|{lift}|1": _run(0.2, cosine=0.979),
    }
    for factor in FACTORS:
        runs.setdefault(f"plain|0|{default}|{factor:g}", _run(0.09 + factor / 100))
    text = page({"runs": runs, "machine": {"cores": "2"}})
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith(("| the", "| lift"))]
    assert rows[0][1:4] == ["**0.1500 ± 0.0707**", "**0.10%**", "0.985 ± 0.007"] and rows[0][-1] == "2 |"
    assert rows[1][1:4] == ["**0.2000**", "0.00%", "**0.979**"]
    assert "| plain | 0.0925 | 0.0950 |" in text and "far from" not in text
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 110
    # Without all of the rates nothing is said of the error.
    assert "**0.2" not in page({"runs": {f"plain|0|{lift}|1": _run(0.2)}, "machine": {}})


def test_the_truths_are_no_others_and_the_settings_exist() -> None:
    tuned = [preset.truth for preset in PRESETS.values()]
    assert all(toy.truth not in tuned and toy.truth.d_in == toy.problem.d for toy in TOYS.values())
    for of_recipe, of_variant in SETTINGS.values():
        TrainingRecipe(10, 8, **of_recipe)
        make_variant("topk", d_in=8, n_latents=16, k=2, **of_variant)
