"""Run configs for the tests: a preset with some values changed."""

from safetydpo_jax import presets
from safetydpo_jax.training.config import RunConfig, make_config

# Of the toy preset: every option that came after the first checkpoints, and some more.
TOY_CHANGES = {
  "cache": "c",
  "dpo.beta": 3.0,
  "lora.rank_pattern": (("conv1", 8), ("to_q", 2)),
  "lora.alpha_pattern": (("conv1", 8.5),),
  "lora.dropout": 0.1,
  "lora.init": "x",
  "schedule": "cosine",
  "mesh.fsdp": 2,
  "resume": False,
}


def run_config(name="all_single", variant="sd15", /, **changes) -> RunConfig:
  """The preset with `changes` by dotted name: `run_config(**{"dpo.beta": 50.0})`."""
  values = presets.get_config(name, variant).to_dict()
  for path, value in changes.items():
    *groups, last = path.split(".")
    node = values
    for group in groups:
      node = node[group]
    node[last] = value
  return make_config(values)
