"""What is read from a compiled program's text."""

import jax
import jax.numpy as jnp
import pytest

from safetydpo_jax.planning import hlo

HLO = """\
HloModule step

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %gather = (f32[2]{0}, f32[8]{0:T(8)S(1)}) all-gather-start(%x), dimensions={0}
  %done = f32[8]{0} all-gather-done(%gather)
  ROOT %t = (s32[], f32[8]{0}) tuple(%x, %done)
}

%condition (q: (s32[], f32[8])) -> pred[] {
  %q = (s32[], f32[8]{0}) parameter(0)
  ROOT %less = pred[] compare(%q, %q), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %w = (s32[], f32[8]{0}) while(%a), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  %y = f32[8]{0} get-tuple-element(%w), index=1
  %z = f32[8]{0} add(%y, %a)
  ROOT %r = (f32[4]{0}, bf16[2,3]{1,0}) all-reduce(%z, %z), to_apply=%sum
}
"""


def test_collectives_in_loops_count_as_often_as_they_run():
  assert hlo.collectives(HLO) == {
    "all-gather": {"count": 5, "bytes": 5 * 8 * 4},
    "all-reduce": {"count": 1, "bytes": 4 * 4 + 6 * 2},
  }


PIECES = """HloModule jit_step

%start (p: f32[2]) -> (f32[2], f32[8]) {
  %p = f32[2]{0} parameter(0)
  ROOT %g.1 = f32[8]{0} all-gather(%p), channel_id=3, dimensions={0}
}

%beside (q: f32[2]) -> f32[8] {
  %q = f32[2]{0} parameter(0)
  ROOT %g.2 = f32[8]{0} all-gather(%q), channel_id=3, dimensions={0}
}

%body (t: f32[2]) -> f32[2] {
  %t = f32[2]{0} parameter(0)
  ROOT %b = f32[8]{0} fusion(%t), kind=kOutput, calls=%beside
}

%condition (u: f32[2]) -> pred[] {
  %u = f32[2]{0} parameter(0)
  ROOT %less = pred[] compare(%u, %u), direction=LT
}

ENTRY %main (a: f32[2]) -> f32[8] {
  %a = f32[2]{0} parameter(0)
  %s = (f32[2]{0}, f32[8]{0}) fusion(%a), kind=kCustom, calls=%start
  %w = f32[2]{0} while(%a), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  %g.3 = f32[8]{0} all-gather(%a), channel_id=4, dimensions={0}
  ROOT %g.4 = f32[8]{0} all-gather(%a), channel_id=4, dimensions={0}
}
"""


def test_a_gather_in_pieces_beside_several_fusions_is_one():
  """Five times in the loop that its start precedes; what is in no fusion is whole."""
  assert hlo.collectives(PIECES) == {"all-gather": {"count": 7, "bytes": 7 * 8 * 4}}


def test_collectives_of_a_program_of_this_compiler():
  mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
  rows, whole = (
    jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
    for axes in (("x",), ())
  )
  total = jax.jit(lambda x: x.sum(axis=0), in_shardings=rows, out_shardings=whole)
  text = total.lower(jnp.zeros((8, 16))).compile().as_text()
  assert hlo.collectives(text) == {"all-reduce": {"count": 1, "bytes": 64}}


def test_bytes_are_multiplied_by_what_stands_in_loops():
  x = jnp.zeros((64, 64))

  def run(length):
    step = jax.jit(lambda x: jax.lax.scan(lambda y, _: (y @ x, None), x, length=length))
    compiled = step.lower(x).compile()
    return hlo.loop_factor(compiled.as_text()), compiled.cost_analysis()["flops"]

  (one, flops_5), (two, flops_50) = run(5), run(50)
  assert flops_50 == pytest.approx(flops_5, rel=0.01)  # XLA counts a body once
  assert two / one == pytest.approx(10, rel=0.15)
