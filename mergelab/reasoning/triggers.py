"""What happens inside decides how a trace goes on: forks where readings disagree, edits only while thinking.

A trace that ends by a reading is a matter of the reading's own bound (`Reading.above`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial

from mergelab.decoding.samplers import row_keys
from mergelab.decoding.transforms import require
from mergelab.interp.probes import Probe
from mergelab.models.sites import Edit
from mergelab.reasoning.growth import Growth
from mergelab.reasoning.readings import Reading
from mergelab.reasoning.writer import Trace, Writer

__all__ = ["disagreement_reading", "write_forking", "write_while_thinking"]


def disagreement_reading(probe: Probe, site: str, above: float) -> Reading:
    """How far a probe and the next-token distribution disagree about whether all is well.

    The distance of the probe's probability from `e^-H`, where `H` is the entropy in nats: a model that is
    sure of its next token while the probe says that the trace goes wrong, or the other way round.

    Args:
        probe: log-odds that a trace comes right.
        site: site that it reads.
        above: distance, from 0 to 1, beyond which a trace is forked (`write_forking`) or ended.
    """
    return Reading("disagreement", (site, "logits"), Partial(_Disagreement(site), probe), "mean", above)


@dataclass(frozen=True)
class _Disagreement:
    site: str

    def __call__(self, probe: Probe, captured: Mapping[str, Array]) -> Array:
        log_probs = jax.nn.log_softmax(captured["logits"].astype(jnp.float32), axis=-1)
        sure = jnp.exp((jnp.exp(log_probs) * log_probs).sum(axis=-1))
        return jnp.abs(jax.nn.sigmoid(probe(captured[self.site])[:, 0]) - sure)


def write_forking(
    writer: Writer, prompt: Sequence[int], rows: int, key: Any = 0, *, start: int = 1
) -> tuple[list[Trace], int]:
    """Traces of which one becomes two where a reading exceeds its bound, until there are `rows` of them.

    So compute goes to the places at which the readings say that it matters. The fork shares all that was
    written, the token among it in whose pass the bound was exceeded.

    Args:
        writer: who writes; one of its readings has a bound.
        prompt: token ids.
        rows: most traces.
        key: a seed or a key of the draws.
        start: number of traces to begin with.

    Returns:
        The traces, `start` to `rows` of them, and the number of tokens that were generated.

    Raises:
        DecodingError: numbers out of range, or no reading has a bound.
    """
    require("write_forking(start)", start, 1 <= start <= rows, f"1 to the {rows} traces there may be")
    bounded = any(one.above is not None for one in writer.readings)
    require("write_forking(writer)", [one.name for one in writer.readings], bounded, "a reading with a bound")
    growth = Growth(writer, prompt, rows, row_keys(key, rows), by_step=False)
    growth.fork([0] * start)
    count = start
    while not growth.ended[:count].all():
        growth.grow(bounded=count < rows)
        stopped = [row for row in range(count) if growth.trace(row).stop == "monitor"]
        forked = stopped[: rows - count]
        if not stopped:
            continue
        growth.fork([*range(count), *forked])
        for row in (*stopped, *range(count, count + len(forked))):
            growth.ended[row] = False
        count += len(forked)
        # One token without a bound: what was exceeded there would end the trace again at once.
        growth.grow(1, bounded=False)
    return [growth.trace(row) for row in range(count)], growth.grown


def write_while_thinking(
    writer: Writer,
    prompt: Sequence[int],
    samples: int,
    key: Any = 0,
    *,
    edit: Mapping[str, Edit],
    end: str = "</think>",
) -> list[Trace]:
    """Traces that are steered or clamped until they have thought, and then left alone.

    Thinking begins with the first new token. What was written under the edit stays in the cache as it was
    computed; from the token after `end` on, the writer's own edits apply, if it has any.

    Args:
        writer: who writes.
        prompt: token ids.
        samples: number of traces.
        key: a seed or a key of the draws.
        edit: edits by site while the model thinks, as in `Model.apply`.
        end: text that ends thinking; also where it is a special token.

    Raises:
        DecodingError: as of `generate`; or `end` is empty.
        SiteError: an edit names no site.
    """
    require("write_while_thinking(end)", end, bool(end), "the text that ends thinking")
    closing = writer.tokenizer.encode(end, add_special_tokens=False)
    # A special token is in no text; what no token spells may be encoded as the one for unknown text.
    is_one = len(closing) == 1 and writer.tokenizer.decode(closing, skip_special_tokens=False).strip() == end
    thinking = replace(
        writer,
        edit={**writer.edit, **edit},
        stops=(*writer.stops, end),
        more_ends=(*writer.more_ends, *(closing if is_one else ())),
    )
    growth = Growth(thinking, prompt, samples, row_keys(key, samples), by_step=False)
    growth.grow()
    growth.go_on(writer)
    growth.grow()
    return [growth.trace(row) for row in range(samples)]
