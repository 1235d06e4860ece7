"""Every tensor of a single file is read, left out and counted, or an error."""

import jax
import pytest
import torch

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.pipeline import load_pipeline
from tests.support.parity import assert_same_params
from tests.support.single_files import ema_name

UNET = "model.diffusion_model."


def ema_of(tensors, scale=2.0):
  return {ema_name(n): x * scale for n, x in tensors.items() if n.startswith(UNET)}


def test_ema_weights_are_left_out_and_counted(bases, originals, write, capsys):
  tensors = originals["sd1"]
  ema = ema_of(tensors)
  counters = {
    "model_ema.decay": torch.tensor(0.9),
    "model_ema.num_updates": torch.ones(1),
  }
  file = write(changes=ema | counters)
  single = load_pipeline(file)
  assert_same_params(single.params, load_pipeline(bases["sd1"]).params)
  total = len(tensors) + len(ema) + 2
  line = capsys.readouterr().err
  assert f"{len(tensors) - 1:,} of {total:,} tensors read" in line
  assert f"EMA weights {len(ema) + 2}" in line
  load_pipeline(file)
  assert not capsys.readouterr().err, "it is said once"


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_ema_weights_are_used_where_there_are_no_others(
  family, bases, originals, write, capsys
):
  base, tensors = bases[family], originals[family]
  single = load_pipeline(write(family, changes=ema_of(tensors), without=[UNET]))
  expected = jax.tree.map(lambda x: 2 * x, load_pipeline(base).params["unet"])
  assert_same_params(single.params["unet"], expected)
  assert "EMA weights, the only ones there" in capsys.readouterr().err


def test_what_trainers_leave_in_a_file_is_named(write, capsys):
  numbers = torch.ones(10)
  names = ("betas", "alphas_cumprod_prev", "sqrt_recipm1_alphas_cumprod", "logvar")
  names += ("log_one_minus_alphas_cumprod", "posterior_mean_coef1", "denoiser.sigmas")
  changes = dict.fromkeys(names, numbers) | {
    "global_step": torch.tensor(3),
    "first_stage_model.loss.logvar": numbers,
    "first_stage_model.loss.discriminator.main.0.weight": numbers,
    "cond_stage_model.logit_scale": numbers[:1],
    "cond_stage_model.transformer.text_projection.weight": numbers,
  }
  load_pipeline(write(changes=changes), components=("unet",))
  line = capsys.readouterr().err
  for count in ("noise schedule 7", "training state 1", "VAE training state 2"):
    assert count in line
  assert "text projections 2" in line


def test_an_unknown_or_a_missing_tensor_is_an_error_that_names_it(write):
  extra = {"model.diffusion_model.input_blocks.1.0.gate": torch.ones(2)}
  with pytest.raises(InputError, match=r"no place .* 1 tensors \(.*1\.0\.gate\)"):
    load_pipeline(write(changes=extra))
  gone = f"{UNET}input_blocks.1.1.norm.bias"
  with pytest.raises(InputError, match=r"lacks 1 tensors \(.*1\.1\.norm\.bias\)"):
    load_pipeline(write(without=[gone]))
  with pytest.raises(InputError, match=r"token_embedding\.weight is missing"):
    load_pipeline(write(without=["cond_stage_model.transformer.text_model.embeddings"]))
  cut = {"first_stage_model.decoder.conv_in.bias": torch.ones(3)}
  with pytest.raises(InputError, match=r"m\.safetensors \(vae\) .*shapes"):
    load_pipeline(write(changes=cut))
