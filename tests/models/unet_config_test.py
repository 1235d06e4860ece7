"""A UNet's config: every field of diffusers' class is read, refused or neutral."""

import inspect
import json

import diffusers
import jax
import jax.numpy as jnp
import pytest
from diffusers.training_utils import EMAModel

from safetydpo_jax.errors import InputError
from safetydpo_jax.models import unet_config
from safetydpo_jax.models.config import freeze
from safetydpo_jax.models.unet import UNet2DCondition
from tests.support.checkpoints import UNET


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("class_embed_type", "timestep"),
    ("num_class_embeds", 7),
    ("dual_cross_attention", True),
    ("resnet_time_scale_shift", "scale_shift"),
    ("act_fn", "gelu"),
    ("down_block_types", ("AttnDownBlock2D", "DownBlock2D")),
    ("up_block_types", ("UpBlock2D", "SkipUpBlock2D")),
    ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
    ("addition_embed_type", "image"),
    ("encoder_hid_dim_type", "text_proj"),
    ("only_cross_attention", True),
    ("time_embedding_type", "fourier"),
    ("timestep_post_act", "silu"),
    ("only_cross_attention", (True, False)),
    ("attention_type", "gated"),
    ("center_input_sample", True),
    ("mid_block_scale_factor", 1.4142),
    ("downsample_padding", 0),
    ("norm_num_groups", None),
    ("dropout", 0.1),
    ("transformer_layers_per_block", ((1, 2), 1)),
    ("transformer_layers_per_block", (-1, 1)),
    ("reverse_transformer_layers_per_block", (1, (1, 2, 3))),
    ("cross_attention_dim", (24, 32)),
    ("attention_head_dim", (4,)),
    ("attention_head_dim", 5),
    ("a_field_of_tomorrow", "on"),
  ],
)
def test_a_config_we_lack_is_refused_by_name(field, value):
  ours = UNet2DCondition(freeze({**UNET, field: value}))
  inputs = jnp.zeros((1, 4, 4, 4)), jnp.zeros((1,)), jnp.zeros((1, 2, 24))
  with pytest.raises(InputError, match=field):
    jax.eval_shape(ours.init, jax.random.key(0), *inputs)


def test_fields_that_change_nothing_are_accepted():
  config = {**UNET, "_class_name": "UNet2DConditionModel", "upcast_attention": True}
  config |= {"class_embed_type": None, "dropout": 0.0, "a_field_of_tomorrow": None}
  config |= {"only_cross_attention": (False, False)}
  # The second level has none, and the middle is like it.
  config |= {"transformer_layers_per_block": (1, 0)}
  config |= {"mid_block_type": "UNetMidBlock2D"}
  ours = UNet2DCondition(freeze(config))
  inputs = jnp.zeros((1, 4, 4, 4)), jnp.zeros((1,)), jnp.zeros((1, 2, 24))
  jax.eval_shape(ours.init, jax.random.key(0), *inputs)


def test_every_parameter_of_diffusers_class_is_read_refused_or_neutral():
  """At diffusers' default a field is read, or changes nothing; no field of both."""
  parameters = inspect.signature(diffusers.UNet2DConditionModel.__init__).parameters
  theirs = {key: p.default for key, p in parameters.items() if key != "self"}
  for field, default in theirs.items():
    if field in unet_config.DEFAULTS:
      assert unet_config.DEFAULTS[field] == default, field
    elif field not in unet_config.IGNORED:
      assert default in unet_config.ACCEPTED.get(field, (None, False)), field
  assert {*unet_config.DEFAULTS, *unet_config.ACCEPTED} <= {*theirs}
  assert set(unet_config.IGNORED) & {*theirs} == {
    "sample_size",
    "addition_embed_type_num_heads",
  }


def test_what_a_moving_average_writes_into_the_config_is_accepted(tmp_path):
  model = diffusers.UNet2DConditionModel(**UNET)
  average = EMAModel(
    model.parameters(),
    model_cls=diffusers.UNet2DConditionModel,
    model_config=model.config,
    use_ema_warmup=True,
  )
  average.step(model.parameters())
  average.save_pretrained(tmp_path)
  config = json.loads((tmp_path / "config.json").read_text())
  assert config["decay"] == 0.9999
  assert config["optimization_step"] == 1
  unet_config.read_levels(freeze(config))
