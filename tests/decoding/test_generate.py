"""Generation is transformers' greedy search, the uncached model's, and independent of the batch."""

from __future__ import annotations

import json
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from mergelab.decoding import (
    Generated,
    RepetitionPenalty,
    Temperature,
    TopPFilter,
    advance,
    begin,
    generate,
    greedy,
    pad_prompts,
    row_keys,
    sample,
    stop_at,
    suppress,
)
from mergelab.errors import DecodingError, SiteError
from mergelab.models.families import FAMILIES
from mergelab.models.model import Model, Params
from mergelab.models.sites import as_partials
from tests.decoding.record_greedy import RECORDED, transformers_greedy
from tests.decoding.tiny import CONFIGS, NEW_TOKENS, PROMPTS, tiny

KINDS = [kind for kind in CONFIGS if kind in FAMILIES]
RANDOM = sample(Temperature(1.5), TopPFilter(0.95))


@pytest.fixture(scope="module")
def llama() -> tuple[Model, Params]:
    return tiny("llama")


def run(loaded: tuple[Model, Params], prompts: list[list[int]] = PROMPTS, **options: object) -> Generated:
    model, params = loaded
    options = {"max_new_tokens": NEW_TOKENS, **options}
    return generate(model, params, *pad_prompts(prompts), **options)  # type: ignore[arg-type]


@cache
def _next_logits(model: Model) -> object:
    return jax.jit(lambda params, tokens: model.apply(params, tokens).logits)


def uncached(loaded: tuple[Model, Params], prompt: list[int], count: int) -> list[int]:
    """Greedy search that reads the whole text for every token, padded on the right to one shape."""
    model, params = loaded
    tokens = list(prompt)
    for _ in range(count):
        padded = jnp.array([tokens + [0] * (32 - len(tokens))], jnp.int32)
        logits = _next_logits(model)(params, padded)  # type: ignore[operator]
        tokens.append(int(jnp.argmax(logits[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_what_transformers_generated(kind: str) -> None:
    recorded = json.loads(RECORDED.read_text())[kind]
    assert len({token for row in recorded for token in row}) > 4  # not one token for ever
    assert run(tiny(kind)).tokens.tolist() == recorded


@pytest.mark.oracle
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_that_of_transformers_with_penalty_and_end(kind: str) -> None:
    loaded = tiny(kind)
    assert run(loaded).tokens.tolist() == transformers_greedy(kind)
    # transformers holds padding against a row too: a penalty is compared where there is none.
    expected = transformers_greedy(kind, penalty=5.0)[0]
    ours = run(loaded, PROMPTS[:1], sampler=greedy(RepetitionPenalty(5.0)))
    assert ours.tokens.tolist() == [expected]
    assert ours.tokens.tolist() != run(loaded, PROMPTS[:1]).tokens.tolist()
    end_id = run(loaded).rows()[2][4]
    stopped = run(loaded, stop=stop_at([end_id]))
    assert stopped.tokens.tolist() == transformers_greedy(kind, end_id=end_id)
    assert stopped.finished[2] and stopped.lengths[2] <= 5


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_changes_nothing(kind: str) -> None:
    rows = run(tiny(kind)).rows()
    assert rows == [uncached(tiny(kind), prompt, NEW_TOKENS) for prompt in PROMPTS]
    assert rows[0] != uncached(tiny(kind), PROMPTS[0][1:], NEW_TOKENS)


def test_a_row_is_the_same_alone_among_others_and_in_another_place(llama: tuple[Model, Params]) -> None:
    keys = row_keys(jax.random.key(7), 3)
    together = run(llama, sampler=RANDOM, key=keys).rows()
    alone = [
        run(llama, [prompt], sampler=RANDOM, key=keys[i : i + 1]).rows() for i, prompt in enumerate(PROMPTS)
    ]
    assert [rows[0] for rows in alone] == together
    turned = run(llama, PROMPTS[::-1], sampler=RANDOM, key=keys[::-1]).rows()
    assert turned[::-1] == together
    assert run(llama, sampler=RANDOM, key=7).rows() == together  # a seed means these keys
    assert run(llama, sampler=RANDOM, key=8).rows() != together


def test_a_longer_run_begins_as_a_shorter_one(llama: tuple[Model, Params]) -> None:
    short = run(llama, sampler=RANDOM, max_new_tokens=5)
    assert short.tokens.shape == (3, 5) and short.lengths.tolist() == [5, 5, 5]
    np.testing.assert_array_equal(short.tokens, run(llama, sampler=RANDOM).tokens[:, :5])


def test_rows_end_at_ids_and_sequences_and_the_others_go_on(llama: tuple[Model, Params]) -> None:
    free = run(llama).rows()
    stop = stop_at([free[0][2]], [free[1][3:5]])
    stopped = run(llama, stop=stop, pad_id=44)
    rows = stopped.rows()
    assert rows[0] == free[0][: free[0].index(free[0][2]) + 1]
    assert rows[1] == free[1][:5]
    assert stopped.finished.tolist() == [True, True, len(rows[2]) < NEW_TOKENS]
    assert set(np.asarray(stopped.tokens)[0, len(rows[0]) :].tolist()) == {44}
    assert rows[2] == free[2][: len(rows[2])]


def test_generation_goes_on_where_it_was(llama: tuple[Model, Params]) -> None:
    model, params = llama
    progress = begin(model, params, *pad_prompts(PROMPTS), max_new_tokens=NEW_TOKENS, stop=stop_at())
    for until in (1, 4, 12):
        progress = advance(
            model,
            params,
            progress,
            jnp.int32(until),
            sampler=RANDOM,
            keys=row_keys(3, 3),
            stop=stop_at(),
            edit=as_partials(None),
        )
        assert int(progress.steps) == until
    np.testing.assert_array_equal(progress.tokens[:, :12], run(llama, sampler=RANDOM, key=3).tokens)
    seen = [set(np.flatnonzero(row).tolist()) for row in np.asarray(progress.seen)]
    rows = np.asarray(progress.tokens)[:, :12].tolist()
    assert seen == [{*prompt, *row} for prompt, row in zip(PROMPTS, rows, strict=True)]


def test_edits_act_on_the_prompt_and_on_every_new_token(llama: tuple[Model, Params]) -> None:
    free = run(llama).tokens.tolist()
    assert run(llama, edit={"blocks.0.resid_post": lambda x: x}).tokens.tolist() == free

    def push(x: jax.Array) -> jax.Array:
        return x.at[:, :, 17].add(100.0)

    assert set(np.ravel(run(llama, edit={"logits": push}).tokens)) == {17}

    # An edit at every position is, for the uncached model, the same edit of the whole text.
    def steer(x: jax.Array) -> jax.Array:
        return x + jnp.sin(jnp.arange(24, dtype=x.dtype))[None, None]

    model, params = llama
    steered = run(llama, PROMPTS[:1], edit={"blocks.0.resid_post": steer}).rows()[0]
    assert steered != free[0]
    text = jnp.array([PROMPTS[0] + steered], jnp.int32)
    whole = jax.jit(lambda p, t: model.apply(p, t, edit={"blocks.0.resid_post": steer}).logits)
    logits = whole(params, text)
    assert jnp.argmax(logits[0, len(PROMPTS[0]) - 1 : -1], axis=-1).tolist() == steered


def test_settings_and_vectors_are_arguments_of_the_compiled_program(
    llama: tuple[Model, Params], caplog: pytest.LogCaptureFixture
) -> None:
    def add(vector: jax.Array, x: jax.Array) -> jax.Array:
        return x + vector[None, None]

    def compiled() -> int:
        """Programs of ours; those of single operations are JAX's."""
        names = ("(run)", "(grown_rows)", "(_empty)", "(_places)")
        return sum("Finished XLA" in r.message and any(n in r.message for n in names) for r in caplog.records)

    with jax.log_compiles():
        run(llama, [[1]], edit={"embed": Partial(add, jnp.zeros(24))}, sampler=sample(Temperature(1.0)))
        before = compiled()
        outputs = [
            run(
                llama,
                [prompt],
                edit={"embed": Partial(add, jnp.full(24, x, jnp.float32))},
                sampler=sample(Temperature(t)),
                max_new_tokens=n,
            ).rows()
            for prompt, x, t, n in (([1, 2], 0.0, 1.0, 12), ([1, 2], 5.0, 1.0, 9), ([1, 2, 3], 0.0, 9.0, 16))
        ]
    assert compiled() == before > 0
    assert len({str(rows[0][:9]) for rows in outputs}) == 3


def test_a_mesh_gives_the_same_tokens(llama: tuple[Model, Params]) -> None:
    model, params = llama
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.NamedSharding(mesh, jax.P(None, "tensor"))
    whole = jax.NamedSharding(mesh, jax.P())
    sharded = jax.tree.map(
        lambda x: jax.device_put(x, split if x.ndim == 2 and x.shape[1] % 2 == 0 else whole), params
    )
    assert run((model, sharded)).tokens.tolist() == run(llama).tokens.tolist()


def test_suppressed_tokens_never_appear(llama: tuple[Model, Params]) -> None:
    free = set(np.ravel(run(llama).tokens).tolist())
    barred = sorted(free)[:3]
    assert not set(barred) & set(np.ravel(run(llama, sampler=greedy(suppress(barred))).tokens).tolist())


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "at least one prompt"),
        ([[1], []], {}, "prompts of at least one token"),
        ([[61]], {}, "ids from 61 to 61.*below the vocabulary's 61"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens was given 0"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(
    llama: tuple[Model, Params], prompts: list[list[int]], options: dict[str, object], message: str
) -> None:
    with pytest.raises(DecodingError, match=message):
        run(llama, prompts, **options)


def test_padding_on_the_right_and_unknown_sites_are_refused(llama: tuple[Model, Params]) -> None:
    model, params = llama
    tokens = np.ones((1, 3), np.int32)
    with pytest.raises(DecodingError, match="padding on the left only"):
        generate(model, params, tokens, np.array([[True, True, False]]), max_new_tokens=2)
    with pytest.raises(DecodingError, match=r"equal \[batch, length\]"):
        generate(model, params, tokens, np.ones((1, 2), bool), max_new_tokens=2)
    with pytest.raises(DecodingError, match="token ids of an integer type"):
        generate(model, params, tokens * 1.0, max_new_tokens=2)
    with pytest.raises(SiteError, match="did you mean 'embed'"):
        generate(model, params, tokens, max_new_tokens=2, edit={"embde": lambda x: x})


def test_a_model_with_learned_positions_stops_at_its_last_one() -> None:
    assert run(tiny("gpt2"), [[5] * 53]).tokens.shape == (1, 12)  # 53 + 11 positions are all 64
    with pytest.raises(DecodingError, match="'65 positions', but needs at most the model's 64 learned"):
        run(tiny("gpt2"), [[5] * 54])
