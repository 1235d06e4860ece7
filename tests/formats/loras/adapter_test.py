"""What LoRA files change besides low-rank products."""

import chex
import jax
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict

from safetydpo_jax import load_lora, lora
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model import weights
from safetydpo_jax.formats.loras import adapter as adapters
from safetydpo_jax.formats.loras.load import load_adapter
from tests.support import dialects, drawn

DRAWN = {
  "LoRA": drawn.draw_lora,
  "LoHa": drawn.draw_loha,
  "LoKr": drawn.draw_lokr,
  "whole LoKr": drawn.draw_lokr_whole,
  "LoKr with a core": drawn.draw_lokr_tucker,
  "full kernels": lambda weight: {"diff": drawn.draw(*weight.shape)},
  "DoRA": drawn.draw_dora,
  "norms": drawn.draw_full,
}
PURE = [name for name in DRAWN if name not in ("DoRA", "norms")]


@pytest.fixture(scope="module")
def params():
  base = dialects.theirs_state(dialects.make_unet("SD1"))
  return weights.convert(base, dialects.tree_shapes("SD1"))


def read(kind, folder, seed=1):
  torch.manual_seed(seed)
  write = dialects.by_twin(dialects.kohya, DRAWN[kind], norms=kind == "norms")
  folder.mkdir(exist_ok=True)
  file, _ = write(dialects.make_unet("SD1"), dialects.TINY["SD1"], folder)
  return load_adapter(str(file))[0], str(file)


result = dialects.with_adapter


@pytest.mark.parametrize("kind", PURE)
def test_what_can_be_a_lora_is_one_exactly(kind, params, tmp_path):
  adapter, file = read(kind, tmp_path)
  tree = load_lora(file)
  lora.check_shapes(params, tree)
  assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(tree))
  chex.assert_trees_all_close(
    result(params, adapters.of_lora(tree)), result(params, adapter), atol=3e-6
  )
  for path, leaf in flatten_dict(tree).items():  # no rank beyond what it takes
    if path[-1] == "b":
      kernel = flatten_dict(params)[*path[:-1], "kernel"]
      wide = leaf.shape[0] > min(kernel.size // kernel.shape[-1], kernel.shape[-1])
      assert not wide or kind == "LoRA"


def test_small_products_are_kept_as_factors_and_large_ones_are_not(tmp_path):
  adapter, _ = read("LoHa", tmp_path)
  layers = {path[:-1] for path in flatten_dict(adapter.lora)}
  inside = ("mid_block", "resnets_0", "conv1")
  assert flatten_dict(adapter.lora)[*inside, "a"].shape == (3, 3, 64, 9)
  assert not layers & {path[:-1] for path in adapter.rest}
  assert ("conv_out", "kernel") in adapter.rest  # to 4 channels: rank 9 is more
  whole, _ = read("whole LoKr", tmp_path)
  assert ("mid_block", "attentions_0", "proj_in", "kernel") in whole.rest


@pytest.mark.parametrize(("kind", "what"), [("DoRA", "DoRA magn"), ("norms", "norms")])
def test_what_cannot_be_a_lora_is_one_line(kind, what, tmp_path):
  _, file = read(kind, tmp_path)
  with pytest.raises(InputError, match=f"{what}.*generate.*--format pipeline"):
    load_lora(file)


@pytest.mark.parametrize("kind", DRAWN)
def test_a_scale_is_a_share_of_the_change(kind, params, tmp_path):
  adapter, _ = read(kind, tmp_path)
  whole, half = (result(params, adapters.scale(adapter, k)) for k in (1, 0.5))
  middle = jax.tree.map(lambda new, old: (new + old) / 2, whole, params)
  chex.assert_trees_all_close(half, middle, atol=3e-6)


def test_adapters_add_up_in_any_order(params, tmp_path):
  """Each is taken from the base itself, DoRA too."""
  kinds = ("DoRA", "full kernels", "LoRA")
  found = [read(kind, tmp_path / kind, n)[0] for n, kind in enumerate(kinds)]
  total = result(params, adapters.add(found))
  chex.assert_trees_all_close(
    total, result(params, adapters.add(found[::-1])), atol=3e-6
  )
  changes = [
    jax.tree.map(np.subtract, result(params, adapter), params) for adapter in found
  ]
  summed = jax.tree.map(lambda *leaves: sum(leaves), params, *changes)
  chex.assert_trees_all_close(total, summed, atol=1e-5)


def test_a_channel_of_zeros_stays_one():
  parts = {"diff": np.zeros((2, 3), np.float32)}
  ones = np.ones((2, 1, 1, 1), np.float32)
  change = adapters.Change(parts, (2, 3, 1, 1), magnitude=ones)
  base = np.array([[0, 0, 0], [3, 0, 4]], np.float32)
  new = base + adapters.difference(base, change)
  np.testing.assert_allclose(new, [[0, 0, 0], [0.6, 0, 0.8]], rtol=1e-6)


def test_everything_that_changes_an_image_changes_the_hash(tmp_path):
  plain, dora = (read(kind, tmp_path / kind)[0] for kind in ("LoRA", "DoRA"))
  path, (change,) = next(iter(dora.rest.items()))

  def other(**fields):
    return dora._replace(rest={**dora.rest, path: (change._replace(**fields),)})

  down = {**change.parts, "down": change.parts["down"] * 2}
  variants = [
    dora,
    adapters.scale(dora, 0.5),
    adapters.Adapter(plain.lora, dora.rest),
    dora._replace(rest=dict(list(dora.rest.items())[1:])),
    other(scale=2.0),
    other(magnitude=change.magnitude * 2),
    other(parts=down),
  ]
  assert len({adapters.sha256(variant) for variant in variants}) == len(variants)
  assert adapters.sha256(plain) == lora.factors_sha256(plain.lora)
  assert adapters.sha256(adapters.of_lora({})) == lora.factors_sha256({})


def test_an_adapter_of_another_model_is_refused(params, tmp_path):
  adapter, _ = read("norms", tmp_path)
  small = jax.tree.map(lambda leaf: leaf[..., :4], params)
  for tree, message in ((small, "made for another model"), ({}, "does not have")):
    with pytest.raises(InputError, match=message):
      adapters.check_shapes(tree, adapter)


def test_a_change_too_large_for_the_weights_is_named(params, tmp_path):
  half = jax.tree.map(lambda leaf: leaf.astype(np.float16), params)
  adapter = adapters.scale(read("full kernels", tmp_path)[0], 1e6)
  with pytest.raises(InputError, match=r"unet\..*weight holds .*float16"):
    adapters.fold(half, adapter.rest)
