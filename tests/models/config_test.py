"""Values of a config.json that cannot be: one line in the words of the file."""

import pytest

from safetydpo_jax.errors import InputError
from safetydpo_jax.models import clip, unet, vae
from safetydpo_jax.models.config import freeze


@pytest.mark.parametrize(
  ("read", "config", "message"),
  [
    (unet.read_levels, {"only_cross_attention": True}, "true is not known"),
    (unet.read_levels, {"act_fn": None}, 'null is not supported, only "silu" or'),
    (unet.read_levels, {"mid_block_type": "X"}, "'X' is not supported, only 'UNetMid"),
    (unet.read_levels, {"block_out_channels": None}, r"null .* such as \[320, 640"),
    (unet.read_levels, {"block_out_channels": "320"}, '"320" is of the wrong type'),
    (unet.read_levels, {"block_out_channels": [320, "x"]}, "wrong type"),
    (unet.read_levels, {"in_channels": None}, "in_channels = null"),
    (unet.read_levels, {"in_channels": True}, "in_channels = true"),
    (unet.read_levels, {"norm_eps": "1e-5"}, "norm_eps"),
    (unet.read_levels, {"use_linear_projection": "yes"}, "use_linear_projection"),
    (unet.read_levels, {"down_block_types": []}, r"down_block_types = \[\]"),
    (vae.read_config, {"scaling_factor": None}, "such as 0.18215"),
    (vae.read_config, {"latents_mean": [0.0]}, r"latents_mean = \[0\.0\]"),
    (clip.read_config, {"hidden_size": "512"}, "hidden_size"),
    (clip.read_config, {"num_hidden_layers": 12.5}, "num_hidden_layers = 12.5"),
  ],
)
def test_a_value_of_another_type_is_named(read, config, message):
  with pytest.raises(InputError, match=rf"config: {next(iter(config))} = .*"):
    read(freeze(config))
  with pytest.raises(InputError, match=message):
    read(freeze(config))


def test_null_means_none_where_there_may_be_none():
  assert unet.read_levels({"mid_block_type": None})[2] is None
  assert clip.read_config({"projection_dim": None}).projection_dim is None
  assert vae.read_config({"scaling_factor": 1}).scaling_factor == 1
