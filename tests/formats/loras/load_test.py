"""LoRAs by name: `L` or `L:scale`, a directory of ours or a file of theirs."""

import chex
import numpy as np
import pytest

from safetydpo_jax import load_lora
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.loras import expert
from safetydpo_jax.formats.loras import load as loras
from safetydpo_jax.formats.loras.write import write_diffusers

BASE = {"name": "sd15", "fingerprint": "0123"}


def make_tree(value):
  factors = {"a": np.full((6, 3), value, np.float32), "b": np.ones((3, 5), np.float32)}
  return {"mid_block": {"attentions_0": {"to_q": factors}}}


@pytest.mark.parametrize(
  ("text", "name", "scale"),
  [
    ("runs/hate", "runs/hate", 1.0),
    ("runs/hate:0.7", "runs/hate", 0.7),
    ("runs/hate:-1", "runs/hate", -1.0),
    ("runs/hate:0", "runs/hate", 0.0),
    ("C:/runs/hate", "C:/runs/hate", 1.0),
    ("C:/runs/hate:2e-1", "C:/runs/hate", 0.2),
    ("2024", "2024", 1.0),
    ("x.safetensors", "x.safetensors", 1.0),
  ],
)
def test_a_number_after_the_last_colon_is_the_scale(text, name, scale):
  assert loras.split_scale(text) == (name, scale)


@pytest.mark.parametrize("scale", ["nan", "inf", "-inf", "1e400"])
def test_a_scale_is_finite(scale):
  with pytest.raises(InputError, match=f"the scale is {scale}; expected a finite"):
    loras.split_scale(f"runs/hate:{scale}")


def test_directories_files_and_folders_of_files_are_read(tmp_path):
  expert.write_expert(tmp_path / "run", make_tree(1), {"base": BASE})
  file = write_diffusers(tmp_path / "theirs", make_tree(2), ("to_q",))
  tree, about = loras.load_lora(str(tmp_path / "run"))
  chex.assert_trees_all_equal(tree, make_tree(1))
  assert about["base"] == BASE
  for name in (file, file.parent):
    tree, about = loras.load_lora(str(name))
    chex.assert_trees_all_equal(tree, make_tree(2))
    assert about == {}
  chex.assert_trees_all_equal(load_lora(str(tmp_path / "run")), make_tree(1))


def test_an_export_in_the_expert_s_own_folder_does_not_hide_the_expert(tmp_path):
  """Else a run trained further would still give its old export."""
  write_diffusers(tmp_path, make_tree(2), ("to_q",))
  expert.write_expert(tmp_path, make_tree(1), {"base": BASE})
  tree, about = loras.load_lora(str(tmp_path))
  chex.assert_trees_all_equal(tree, make_tree(1))
  assert about["base"] == BASE


def test_a_name_that_leads_nowhere_is_named(tmp_path):
  with pytest.raises(InputError, match=f"no LoRA at {tmp_path / 'nothing'}"):
    loras.load_lora(str(tmp_path / "nothing"))
  with pytest.raises(InputError, match=f"{tmp_path} is no finished expert"):
    loras.load_lora(str(tmp_path))


def test_the_fingerprint_decides_whether_a_lora_fits_not_the_name():
  about = {"base": BASE}
  loras.check_fits("hate", about, "0123")
  loras.check_fits("foreign.safetensors", {}, "4567")
  with pytest.raises(InputError, match=r"hate was trained on sd15 .*0123.*has .*4567"):
    loras.check_fits("hate", about, "4567")
