"""Exchanges between chips, read off programs."""

from __future__ import annotations

from mergelab.aot.worker import collectives


def test_collectives_are_read_off_a_program() -> None:
    program = """
  %fusion = bf16[4,8]{1,0:T(8,128)(2,1)} fusion(%all-reduce.1), kind=kLoop
  %all-reduce.1 = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} all-reduce(%p), channel_id=1
  %all-reduce.2 = (f32[2]{0}, f32[3]{0}) all-reduce(%p, %q), channel_id=2
  %ag = (bf16[2,8]{1,0}, bf16[8,8]{1,0}) all-gather-start(%p), dimensions={0}
  %agd = bf16[8,8]{1,0} all-gather-done(%ag)
"""
    assert collectives(program) == {"all-reduce": (2, 64 + 20), "all-gather": (1, 128)}
