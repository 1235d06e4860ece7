"""Experts of the tiny checkpoint."""

import pytest

from safetydpo_jax.formats.base_model.pipeline import load_pipeline
from tests.support.experts import make_experts


@pytest.fixture(scope="session")
def load(tiny_checkpoint):
  return lambda: load_pipeline(tiny_checkpoint, components=("unet", "text_encoder"))


@pytest.fixture(scope="session")
def experts(load):
  return make_experts(load().unet_shapes())
