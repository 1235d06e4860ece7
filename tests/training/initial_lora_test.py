"""Training starts fresh, or exactly where a finished LoRA stands."""

import dataclasses

import chex
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from safetydpo_jax import lora
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.pipeline import load_pipeline
from safetydpo_jax.formats.loras import expert
from safetydpo_jax.formats.loras.write import write_diffusers
from safetydpo_jax.training import initial_lora
from tests.support.configs import run_config
from tests.support.twins import random_lora

TARGETS = ("to_q", "conv1")


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint):
  return load_pipeline(tiny_checkpoint, components=())


@pytest.fixture(scope="module")
def tree(pipeline):
  return random_lora(pipeline.unet_shapes(), rank=3, targets=TARGETS)


@pytest.fixture(scope="module")
def file(tree, tmp_path_factory):
  return write_diffusers(tmp_path_factory.mktemp("lora"), tree, TARGETS)


def settings(**changes):
  values = {"rank": 3, "targets": TARGETS, **changes}
  return dataclasses.replace(run_config().lora, **values)


def test_without_a_file_the_lora_is_fresh_with_ranks_by_layer(pipeline):
  make, origin = initial_lora.first_lora(
    settings(rank_pattern=(("conv1", 5),), seed=7), pipeline
  )
  assert origin is None
  expected = lora.init_lora(
    jax.random.key(7), pipeline.unet_shapes(), 3, TARGETS, (("conv1", 5),)
  )
  chex.assert_trees_all_equal(make(), expected)


@pytest.mark.parametrize("alpha", [3.0, 6.0])
def test_with_a_file_step_0_is_its_lora_whatever_the_alpha(pipeline, tree, file, alpha):
  pattern = (("conv1", 1.0),)
  make, origin = initial_lora.first_lora(
    settings(init=str(file), alpha=alpha, alpha_pattern=pattern), pipeline
  )
  folded = lora.fold_alpha(jax.jit(make)(), alpha, pattern)
  chex.assert_trees_all_close(folded, tree, rtol=1e-5)
  assert origin["path"] == str(file)
  assert len(origin["sha256"]) == 64


def test_another_alpha_per_layer_keeps_the_product(pipeline, tree, file):
  """What is trained differs from the file by the scale, so the fold is not idle."""
  make, _ = initial_lora.first_lora(settings(init=str(file), alpha=6.0), pipeline)
  for path, leaf in flatten_dict(make()).items():
    factor = 0.5 if path[-1] == "b" else 1.0
    np.testing.assert_allclose(leaf, factor * flatten_dict(tree)[path], rtol=1e-5)


def test_a_run_of_ours_of_another_base_model_is_refused(pipeline, tree, tmp_path):
  about = {"base": {"name": "elsewhere", "fingerprint": "0" * 16}}
  expert.write_expert(tmp_path / "run", tree, about)
  with pytest.raises(InputError, match=r"was trained on elsewhere"):
    initial_lora.first_lora(settings(init=str(tmp_path / "run")), pipeline)


WRONG = {
  "rank": ({"rank": 4}, r"has rank 3, the config has 4; set lora\.rank and"),
  "one rank": ({"rank_pattern": (("conv1", 2),)}, "conv1 has rank 3, .* has 2"),
  "fewer": ({"targets": ("to_q",)}, r"conv1, which is not a layer of lora\.t"),
  "more": (
    {"targets": (*TARGETS, "to_v")},
    "not adapt .*to_v, which is a layer of",
  ),
  "no file": ({"init": "/nowhere/at/all"}, "there is no LoRA at /nowhere/at/all"),
  "alpha": ({"alpha": 0.0}, r"config\.lora\.alpha is 0\.0; expected above 0"),
  "alphas": ({"alpha_pattern": (("to_v", 1),)}, "'to_v' matches no layer"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_one_clear_line(pipeline, file, changes, message):
  with pytest.raises(InputError, match=message) as caught:
    initial_lora.first_lora(settings(**{"init": str(file), **changes}), pipeline)
  assert "\n" not in str(caught.value)


def test_a_lora_of_another_shape_is_named(tree):
  factors = flatten_dict(tree)
  path = next(path for path in factors if path[-1] == "a")
  wrong = unflatten_dict({**factors, path: np.zeros((99, 3))})
  with pytest.raises(
    InputError, match=r"is \(99, 3\), the model's is .* of this model"
  ):
    initial_lora.check_fits(wrong, tree, "file")
