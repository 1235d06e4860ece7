"""Every test runs on eight virtual CPU devices, offline, without silent broadcasts."""

import gc
import os
from importlib import metadata

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "")
  + " --xla_force_host_platform_device_count=8"
  # Compiling is most of the suite's time: level 0 takes half of the usual, and a module
  # in one piece a fifth less than in pieces for threads, which the other worker has.
  + " --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
)

# XLA's new fusion emitters take as long again. Later versions have no others.
if metadata.version("jaxlib").startswith("0.10."):
  os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_finish():
  """Freezes what was imported: each collection would look at it for half a second."""
  gc.collect()
  gc.freeze()
  gc.set_threshold(100_000, 20, 50)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
  """A tiny Stable Diffusion 1.x directory with random weights; see checkpoints.py."""
  from tests.support.checkpoints import save_tiny_checkpoint

  return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")
