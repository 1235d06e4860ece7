"""Configs are read from shapes, or the tensor whose shape is impossible is named."""

import pytest
import torch

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.pipeline import load_pipeline

UNET = "model.diffusion_model."
TEXT = "cond_stage_model.transformer.text_model."
VAE = "first_stage_model."
IN_PROJ = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_"
# Tensors from which configs are derived, and which are cut into parts.
MISSHAPEN = {
  "no axes": ("sd1", f"{UNET}input_blocks.1.0.in_layers.2.weight", torch.tensor(1.0)),
  "one axis": (
    "sd1",
    f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
    torch.ones(3),
  ),
  "too many axes": (
    "sd1",
    f"{TEXT}embeddings.token_embedding.weight",
    torch.ones(2, 3, 4),
  ),
  "no features": (
    "sd1",
    f"{VAE}encoder.down.0.block.0.conv1.weight",
    torch.ones(0, 3, 3, 3),
  ),
  "no groups": (
    "sd1",
    f"{VAE}encoder.down.0.block.0.conv1.weight",
    torch.ones(33, 3, 3, 3),
  ),
  "no thirds": ("sd2", f"{IN_PROJ}weight", torch.ones(3 * 64 + 2, 64)),
  "nothing to cut": ("sd2", f"{IN_PROJ}bias", torch.tensor(1.0)),
}


@pytest.mark.parametrize("case", MISSHAPEN.values(), ids=MISSHAPEN)
def test_a_tensor_of_another_shape_is_an_error(case, write):
  family, name, tensor = case
  place = name.removeprefix(UNET).removeprefix(VAE).removeprefix(TEXT)
  # The groups are the config's, and the parts of a cut tensor have names of their own.
  named = rf"{place} has shape|= \[33, 64\] .* = 32|encoder\.layers\.0\..*_proj"
  with pytest.raises(InputError, match=named):
    load_pipeline(write(family, changes={name: tensor}))


@pytest.mark.parametrize("number", ["10000000000", "9" * 5000])
@pytest.mark.parametrize(
  "place",
  [
    f"{TEXT}encoder.layers.",
    f"{VAE}encoder.down.",
    f"{VAE}encoder.down.0.block.",
    f"{UNET}input_blocks.1.1.transformer_blocks.",
  ],
)
def test_a_block_of_any_number_is_no_reason_to_build_as_many(number, place, write):
  changes = {f"{place}{number}.conv1.weight": torch.ones(32, 32, 3, 3)}
  with pytest.raises(InputError, match=rf"{place.removeprefix(VAE)}\d"):
    load_pipeline(write(changes=changes))


def test_more_layers_than_any_model_has_are_not_built(write):
  more = {f"{TEXT}encoder.layers.{n}.mlp.fc1.bias": torch.ones(2) for n in range(101)}
  with pytest.raises(InputError, match=r"more than 100 encoder\.layers"):
    load_pipeline(write(changes=more))
