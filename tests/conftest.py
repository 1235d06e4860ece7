"""Every test runs on eight virtual CPU devices, offline, without silent broadcasts."""

import os

from tests.support.runs import COMPILER

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "")
  + " --xla_force_host_platform_device_count=8 "
  + COMPILER
)

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
  """A tiny Stable Diffusion 1.x directory with random weights; see checkpoints.py."""
  from tests.support.checkpoints import save_tiny_checkpoint

  return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")
