"""`plan`: published chips, arithmetic by hand, the compiler's text, one compilation.

The compilation is of a tiny Stable Diffusion with 32 × 32 latents, the smallest whose
self attention goes to the TPU's kernel.
"""

import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from configs import base
from safetydpo_jax import plan
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.pipeline import parameter_shapes
from safetydpo_jax.models import published
from safetydpo_jax.models.clip import CLIPText
from safetydpo_jax.models.config import freeze
from safetydpo_jax.models.unet import UNet2DCondition
from safetydpo_jax.planning import chips, flops, hlo, measure, roofline, shapes

TINY = {
  "unet": {
    "sample_size": 32,
    "block_out_channels": [40],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "mid_block_type": None,
    "up_block_types": ["CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 16,
    "attention_head_dim": 1,
  },
  "vae": {
    "block_out_channels": [8] * 4,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "norm_num_groups": 4,
  },
  "text_encoder": {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 64,
  },
}


@pytest.fixture
def tiny(tmp_path):
  """A directory of config.json files, without one weight."""
  for name, config in TINY.items():
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text(json.dumps(config))
  (tmp_path / "scheduler").mkdir()
  (tmp_path / "scheduler" / "scheduler_config.json").write_text("{}")
  return tmp_path


@pytest.mark.parametrize(
  ("name", "tflops", "memory", "bandwidth", "links"),
  [
    ("v4", 275, 32 * 2**30, 1200, 600),
    ("v5e", 197, 16 * 2**30, 819, 400),
    ("v5p", 459, 95 * 2**30, 2765, 1200),
    ("v6e", 918, 32 * 2**30, 1638, 800),
    ("a100", 312, 80e9, 2039, 600),
    ("h100", 989, 80e9, 3350, 900),
    ("h200", 989, 141e9, 4800, 900),
  ],
)
def test_chips_are_as_published(name, tflops, memory, bandwidth, links):
  chip = chips.CHIPS[name]
  assert (chip.flops / 1e12, chip.memory) == (tflops, memory)
  assert (chip.bandwidth / 1e9, chip.links / 1e9) == (bandwidth, links)


@pytest.mark.parametrize(
  ("text", "count"),
  [
    ("v5e:4x4", 16),
    ("v4:2x2x2", 8),
    ("v5p:2x2x1", 4),
    ("v6e:8x8", 64),
    ("gpu:h100x8", 8),
  ],
)
def test_topologies_are_read(text, count):
  assert chips.read_topology(text).count == count


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("v9:4x4", "is unknown; expected one like v4:2x2x2"),
    ("h100x8", "is unknown"),
    ("gpu:v5e", "is unknown"),
    ("v5e:4x4x4", "comes in shapes like 4x4"),
    ("v4:16", "comes in shapes like 4x4x4"),
    ("v5e:0x4", "comes in shapes like"),
    ("v5e", "comes in shapes like"),
  ],
)
def test_other_topologies_are_refused(text, message):
  with pytest.raises(InputError, match=message):
    chips.read_topology(text)


@pytest.mark.parametrize(
  ("name", "unet", "encoders"),
  [
    ("sd15", published.SD15_UNET, [published.CLIP_L]),
    ("sdxl", published.SDXL_UNET, [published.CLIP_L, published.CLIP_BIGG]),
  ],
)
def test_built_in_models_have_the_published_shapes(name, unet, encoders):
  ours, _, texts, _ = shapes.read_configs(name)
  modules = [UNet2DCondition(freeze(ours)), *(CLIPText(freeze(x)) for x in texts)]
  theirs = [UNet2DCondition(freeze(unet)), *(CLIPText(freeze(x)) for x in encoders)]
  for mine, other in zip(modules, theirs, strict=True):
    assert parameter_shapes(mine) == parameter_shapes(other)


def test_operations_of_products_loops_and_convolutions():
  x, w = jnp.zeros((3, 5)), jnp.zeros((5, 5))

  def loop(x, w):
    return jax.lax.scan(lambda x, _: (x @ w, None), x, length=7)[0] @ w

  assert flops.count_flops(jax.make_jaxpr(loop)(x, w).jaxpr) == 8 * 2 * 3 * 5 * 5
  image, kernel = jnp.zeros((2, 8, 8, 4)), jnp.zeros((3, 3, 4, 6))
  convolve = jax.make_jaxpr(
    lambda x, k: jax.lax.conv_general_dilated(
      x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
  )(image, kernel)
  assert flops.count_flops(convolve.jaxpr) == 2 * (2 * 4 * 4 * 6) * (3 * 3 * 4)


def test_operations_of_rematerialised_products_count_twice():
  x, w = jnp.zeros((3, 5)), jnp.zeros((5, 5))

  def loss(function):
    return lambda x, w: jnp.sin(function(x, w) @ w).sum()

  def count(function):
    return flops.count_flops(jax.make_jaxpr(jax.grad(loss(function)))(x, w).jaxpr)

  def product(x, w):
    return jnp.sin(jnp.sin(x @ w) @ w)

  once = 2 * 3 * 5 * 5
  assert count(jax.checkpoint(product)) - count(product) >= once


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


def test_roofline_by_hand():
  slice_ = chips.read_topology("v5e:2x2")
  found = roofline.estimate(
    slice_,
    flops=197e12 * 0.5,
    moved=819e9 * 0.25,
    collectives={"all-reduce": {"count": 1, "bytes": 100_000_000}},
    pairs=16,
    steps=3600,
  )
  links = 2 * 100e6 * 3 / 4 / 200e9
  assert found["links"] == pytest.approx(links)
  assert found["bound"] == "compute"
  top = found["roofline"]
  assert top["step_seconds"] == pytest.approx(0.5 + links)
  assert top["pairs_per_second"] == pytest.approx(16 / (0.5 + links))
  assert top["run_chip_hours"] == pytest.approx(4 * (0.5 + links))
  assert found["reached"]["step_seconds"] == pytest.approx(0.5 / 0.4 + links)


def test_a_gather_is_among_the_chips_that_share_the_weights():
  slice_ = chips.read_topology("v5e:4x4")
  gathers = {"all-gather": {"count": 1, "bytes": 1e9}}
  found = roofline.estimate(slice_, 1.0, None, gathers, 16, 1, fsdp=4)
  assert found["links"] == pytest.approx(1e9 * 3 / 4 / 200e9)
  assert (found["memory"], found["bound"]) == (None, "links")


@pytest.mark.parametrize(
  ("used", "most", "compilations"),
  [
    (lambda pairs: 4 + pairs, 12, 4),  # affine: two, the answer, one more
    (lambda pairs: 4 + 0.5 * pairs + 0.021 * pairs**2, 14, 7),
    (lambda pairs: 4 + max(0, pairs - 100), 112, 11),  # the first two alike
    (lambda pairs: 15 + pairs, 1, 2),
    (lambda pairs: 16 + pairs, 0, 1),
  ],
)
def test_the_largest_batch_is_found_and_not_looked_for_at_the_end_of_the_world(
  used, most, compilations, monkeypatch
):
  """As memory in GiB by pairs, of 16: no program of billions of rows is compiled."""
  slice_, tried = chips.read_topology("v5e:2x2"), []

  def compile_step(config, topology, devices):
    pairs = config.batch_size // topology.count
    tried.append(pairs)
    total = used(pairs) * chips.GIB
    return {"fits": total <= topology.chip.memory, "memory": {"total": total}}

  monkeypatch.setattr(measure, "compile_step", compile_step)
  found, _ = measure.largest_batch(base.get_config(), slice_, [])
  assert found == most
  assert len(tried) <= compilations
  assert max(tried) <= 8 * max(most, 1)


def test_float32_has_a_peak_of_its_own():
  tpu, gpu = (chips.read_topology(name) for name in ("v5e:2x2", "gpu:h100x8"))
  for topology, peak in ((tpu, 197e12 / 6), (gpu, 67e12)):
    found = roofline.estimate(topology, peak, 0.0, {}, 16, 1, "float32")
    assert found["compute"] == pytest.approx(1.0)


# Two slices of v5e, as GKE gives them; the mesh's rows, and the slice of each device.
SLICES = """
from jax.experimental import topologies
from safetydpo_jax import sharding
from safetydpo_jax.planning import chips

chips.tpu_devices(chips.read_topology("v5e:4x4"))
devices = topologies.get_topology_desc(
  platform="tpu", topology_name="v5e:4x4", num_slices=2
).devices
mesh = sharding.make_mesh(8, 4, devices)
assert mesh.shape == {"data": 8, "fsdp": 4}, mesh.shape
print([[device.slice_index for device in row] for row in mesh.devices])
try:
  sharding.make_mesh(1, 32, devices)
except sharding.InputError as error:
  print(error)
"""


def test_several_slices_lie_along_the_data_axis():
  done = run_python("-c", SLICES)
  assert "[[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 1" in done.stdout
  assert "mesh.data is 1 on 2 slices; expected a multiple" in done.stdout


def run_python(*arguments):
  """A process of its own: what libtpu does stays there. Skips without libtpu."""
  done = subprocess.run(
    [sys.executable, *arguments],
    capture_output=True,
    text=True,
    timeout=600,
    env=os.environ | {"XLA_FLAGS": ""},
    check=False,
  )
  if re.search("is not installed|admits one at a time", done.stderr):
    pytest.skip(done.stderr)
  assert done.returncode == 0, done.stderr
  return done


def test_a_tiny_step_compiled_for_v5e(tiny, tmp_path):
  file = tmp_path / "plan.json"
  done = run_python(
    *("-m", "safetydpo_jax.plan"),
    *("--config", "configs/hate.py", f"--config.model={tiny}"),
    *("--topology", "v5e:2x2", "--json", str(file)),
    *("--config.batch_size=8", "--config.accumulation=2"),
  )
  found = json.loads(file.read_text())
  assert found["fits"] is True
  assert found["kernels"] > 0  # flash attention
  assert set(found["collectives"]) == {"all-reduce"}
  assert found["memory"]["temporaries"] > 0
  assert "4 × TPU v5e (compiled for the chip)" in done.stdout


def test_gpus_are_counted_and_say_so(tiny, capsys):
  line = f"--config configs/hate.py --config.model={tiny} --topology gpu:h100x8"
  plan.main(line.split())
  text = capsys.readouterr().out
  assert "8 × H100 SXM (arithmetic, not compiled)" in text
  assert "temporaries      not known" in text


@pytest.mark.parametrize(
  ("extra", "message"),
  [
    (["--topology", "v7:1"], "--topology v7:1 is unknown"),
    (
      ["--topology", "v6e:8x8"],
      "config.batch_size is 16 pairs; expected a multiple of",
    ),
    (["--topology", "v5e:2x2", "--config.beta=1"], "beta"),
    (["--topology", "gpu:h100", "--config.model=nowhere"], "config.model is 'nowhere'"),
    (["--topology", "gpu:h100", "--config.accumulation=0"], "config.accumulation is 0"),
    (["--topology", "gpu:h100x8", "--largest_batch"], "needs the compiler"),
    (["--topology", "gpu:h100x8", "--json", "nowhere/a.json"], "there is no folder"),
    (
      ["--topology", "gpu:h100x8", "--config.mesh.fsdp=3"],
      "is -1 × 3, but there are 8",
    ),
  ],
)
def test_bad_input_is_one_clear_line(extra, message):
  with pytest.raises(InputError, match=message) as error:
    plan.main(["--config", "configs/hate.py", *extra])
  assert "\n" not in str(error.value)


def test_an_accumulation_that_does_not_divide_is_lowered_and_told(tiny):
  _, config = plan.parse_arguments(
    ["--config", "configs/hate.py", "--topology", "v5e:4x4"]
  )
  note = plan.settle_batch(config, chips.read_topology("v5e:4x4"))
  assert config.accumulation == 1
  assert "planned with --config.accumulation=1" in note
