"""A LoRA of the tiny checkpoint, its file, and inputs to compare predictions on."""

import pytest

from safetydpo_jax import load_pipeline
from safetydpo_jax.formats.loras.write import write_diffusers
from tests.support import twins


@pytest.fixture(scope="session")
def pipeline(tiny_checkpoint):
  return load_pipeline(str(tiny_checkpoint), components=("unet",))


@pytest.fixture(scope="session")
def tree(pipeline):
  return twins.random_lora(pipeline.params["unet"])


@pytest.fixture(scope="session")
def inputs():
  return twins.draw_inputs()


@pytest.fixture
def exported(tree, tmp_path):
  """diffusers' file of the LoRA."""
  return write_diffusers(tmp_path, tree, twins.ATTENTION)
