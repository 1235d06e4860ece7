"""Values of a config.json that cannot be: one line in the words of the file."""

import pytest

from safetydpo_jax.errors import InputError
from safetydpo_jax.models import clip, vae
from safetydpo_jax.models.config import freeze
from safetydpo_jax.models.unet_config import read_levels


@pytest.mark.parametrize(
  ("read", "config", "message"),
  [
    (read_levels, {"only_cross_attention": True}, "true is not known"),
    (read_levels, {"act_fn": None}, 'null is not supported, only "silu" or'),
    (read_levels, {"mid_block_type": "X"}, "'X' is not supported, only 'UNetMid"),
    (read_levels, {"block_out_channels": None}, r"null .* such as \[320, 640"),
    (read_levels, {"block_out_channels": "320"}, '"320" is of the wrong type'),
    (read_levels, {"block_out_channels": [320, "x"]}, "wrong type"),
    (read_levels, {"in_channels": None}, "in_channels = null"),
    (read_levels, {"in_channels": True}, "in_channels = true"),
    (read_levels, {"norm_eps": "1e-5"}, "norm_eps"),
    (read_levels, {"use_linear_projection": "yes"}, "use_linear_projection"),
    (read_levels, {"down_block_types": []}, r"down_block_types = \[\]"),
    (read_levels, {"block_out_channels": 320}, "wrong type"),
    (read_levels, {"in_channels": [4, 4]}, "wrong type"),
    (read_levels, {"norm_eps": [1e-5]}, "wrong type"),
    (read_levels, {"block_out_channels": [320] * 11}, "at most 10 levels"),
    (read_levels, {"block_out_channels": [33] * 4}, "norm_num_groups = 32"),
    (read_levels, {"layers_per_block": 101}, "above 0 to 100,"),
    (read_levels, {"in_channels": 10**400}, "above 0 to 1,000,000"),
    (read_levels, {"norm_num_groups": 0}, "above 0"),
    (read_levels, {"norm_eps": float("nan")}, "above 0"),
    (read_levels, {"freq_shift": -1}, "from 0 to"),
    (read_levels, {"time_cond_proj_dim": "x"}, "expected a whole number"),
    (vae.read_config, {"layers_per_block": [2]}, "wrong type"),
    (vae.read_config, {"scaling_factor": 0}, "above 0"),
    (vae.read_config, {"block_out_channels": [33]}, "norm_num_groups = 32"),
    (clip.read_config, {"num_attention_heads": 0}, "above 0"),
    (clip.read_config, {"num_hidden_layers": 10**9}, "above 0 to 100"),
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
  assert read_levels({"mid_block_type": None})[2] is None
  assert clip.read_config({"projection_dim": None}).projection_dim is None
  assert vae.read_config({"scaling_factor": 1}).scaling_factor == 1


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ({}, "addition_time_embed_dim = null"),
    ({"addition_time_embed_dim": 256}, "input_dim = null; expected a whole number"),
    (
      {
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 6 * 256,
      },
      "1536; expected more than six times",
    ),
  ],
)
def test_the_sizes_of_sdxl_s_embedding_are_needed(sizes, message):
  with pytest.raises(InputError, match=message):
    read_levels({"addition_embed_type": "text_time", **sizes})


def test_a_projection_has_a_size():
  config = {"architectures": ("CLIPTextModelWithProjection",), "projection_dim": None}
  with pytest.raises(InputError, match="projection_dim = null; expected the size"):
    clip.read_config(config)
