"""The vision tower equals transformers'."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model import weights
from safetydpo_jax.formats.clip.files import tower_shapes
from safetydpo_jax.models import clip_vision
from safetydpo_jax.models.config import freeze
from tests.support.checkpoints import perturb
from tests.support.clips import VISION
from tests.support.parity import NETWORK, apply, draw, tensor

CONFIGS = {
  "quick_gelu": {},
  "gelu, another epsilon": {"hidden_act": "gelu", "layer_norm_eps": 1e-3},
  "one layer, one head": {"num_hidden_layers": 1, "num_attention_heads": 1},
  "patches that leave a rest": {"image_size": 30, "patch_size": 7},
  "one patch": {"patch_size": 32, "projection_dim": 5},
}


def build(overrides):
  config = {**VISION, "projection_dim": 12, **overrides}
  theirs = perturb(
    transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**config))
  )
  ours = clip_vision.CLIPVision(freeze(config))
  tensors = (
    (name.removeprefix("vision_model."), value.numpy())
    for name, value in theirs.state_dict().items()
  )
  params = weights.convert(tensors, tower_shapes(ours))
  return theirs, ours, params, config["image_size"]


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name):
  theirs, ours, params, size = build(CONFIGS[name])
  images = draw(3, size, size, 3)
  with torch.no_grad():
    expected = theirs(tensor(images)).image_embeds
  assert expected.std() > 0.1
  got = apply(ours, params, images)
  np.testing.assert_allclose(got, expected, rtol=0, atol=NETWORK)


def test_bfloat16_stays_near_float32():
  _, ours, params, size = build({})
  images = draw(3, size, size, 3)
  exact = apply(ours, params, images)
  got = apply(ours.clone(dtype=jnp.bfloat16), params, images)
  assert got.dtype == jnp.bfloat16
  assert np.sqrt(np.mean((np.float32(got) - exact) ** 2)) < 0.05 * exact.std()


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("hidden_act", "relu"),
    ("num_channels", 4),
    ("hidden_size", 25),
    ("patch_size", 64),
    ("patch_size", 0),
  ],
)
def test_a_config_we_lack_is_refused_by_name(field, value):
  with pytest.raises(InputError, match=field):
    clip_vision.read_config(freeze({**VISION, field: value}))
