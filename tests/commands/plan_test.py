"""`plan` as a command: one compilation, one count, and input that is wrong.

The compilation is of a tiny Stable Diffusion with 32 × 32 latents, the smallest with
self attention that goes to the TPU's kernel.
"""

import json
import os
import re
import subprocess
import sys

import pytest

from safetydpo_jax import plan
from safetydpo_jax.errors import InputError

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


# Two slices of v5e, as GKE gives them; the mesh's rows, and the slice of each device.
SLICES = """
from jax.experimental import topologies
from safetydpo_jax.runtime import sharding
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
    (["--topology", "gpu:h100x8", "--largest_batch"], "--largest_batch needs"),
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
