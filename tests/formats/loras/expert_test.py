"""Expert directories: exact, finished or refused, never speaking of another LoRA."""

import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.loras import expert

ABOUT = {"category": "hate", "base": {"name": "sd15", "fingerprint": "0123"}}


def make_tree(seed):
  rng = np.random.default_rng(seed)
  factors = {
    "a": rng.standard_normal((6, 3)).astype(np.float32),
    "b": rng.standard_normal((3, 5)).astype(np.float32),
  }
  return {"down_blocks_0": {"attn1": {"to_q": factors, "to_out_0": factors}}}


@pytest.fixture
def folder(tmp_path):
  expert.write_expert(tmp_path / "runs" / "hate", make_tree(0), ABOUT)
  return tmp_path / "runs" / "hate"


def test_what_is_written_is_read_exactly(folder):
  tree, about = expert.read_expert(folder)
  chex.assert_trees_all_equal(tree, make_tree(0))
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(tree))
  assert ABOUT.items() <= about.items()
  assert {"jax", "safetydpo-jax"} <= about["versions"].keys()


def test_arrays_of_eight_devices_are_read_without_them(tmp_path):
  mesh = jax.make_mesh((8,), ("data",))
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  expert.write_expert(tmp_path, jax.device_put(make_tree(1), everywhere), ABOUT)
  tree, _ = expert.read_expert(tmp_path)
  chex.assert_trees_all_equal(tree, make_tree(1))
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(tree))


def test_a_relative_path_is_as_good(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  expert.write_expert("hate", make_tree(0), ABOUT)
  chex.assert_trees_all_equal(expert.read_expert("hate")[0], make_tree(0))


def test_training_again_replaces_the_expert(folder):
  expert.write_expert(folder, make_tree(2), {**ABOUT, "category": "sexual"})
  tree, about = expert.read_expert(folder)
  chex.assert_trees_all_equal(tree, make_tree(2))
  assert about["category"] == "sexual"


def test_a_write_that_stops_halfway_leaves_no_manifest_of_the_lora_before(
  folder, monkeypatch
):
  def stop(*_, **__):
    raise KeyboardInterrupt

  monkeypatch.setattr(ocp.StandardCheckpointer, "save", stop)
  with pytest.raises(KeyboardInterrupt):
    expert.write_expert(folder, make_tree(1), ABOUT)
  with pytest.raises(InputError, match="a finished expert"):
    expert.read_expert(folder)


def test_a_folder_that_cannot_be_written_is_named_at_once(tmp_path):
  (tmp_path / "file").touch()
  for folder in ("/proc/expert", tmp_path / "file"):
    with pytest.raises(InputError, match=f"cannot write to {folder}"):
      expert.write_expert(folder, make_tree(0), ABOUT)


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_damaged_lora_is_named(damage, folder):
  if damage == "gone":
    shutil.rmtree(folder / "lora")
  else:
    for file in (folder / "lora").rglob("d/*"):
      file.write_bytes(file.read_bytes()[:3])
  with pytest.raises(InputError, match=f"{folder / 'lora'} is not a readable LoRA"):
    expert.read_expert(folder)


@pytest.mark.parametrize("about", [[], {}, {"base": "sd15"}, {"base": {"name": "x"}}])
def test_a_manifest_that_does_not_name_the_base_model_is_refused(about, folder):
  (folder / expert.MANIFEST).write_text(json.dumps(about))
  with pytest.raises(InputError, match=r"base\.name and base\.fingerprint"):
    expert.read_expert(folder)


def test_half_precision_factors_survive_as_written(tmp_path):
  tree = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), make_tree(0))
  expert.write_expert(tmp_path, tree, ABOUT)
  read, _ = expert.read_expert(tmp_path)
  chex.assert_trees_all_equal(read, tree)
  chex.assert_trees_all_equal_dtypes(read, tree)
