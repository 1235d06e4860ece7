"""A UNet and its PyTorch twin under LoRAs: trees, inputs and predictions."""

import functools

import jax
import numpy as np
import torch

from safetydpo_jax import load_lora, lora

ATTENTION = lora.ATTENTION_TARGETS
# Every kind of layer a LoRA may adapt: linear, 1×1 and 3×3 convolution, stride 2.
EVERY_KIND = (
  *ATTENTION,
  "ff.net.0.proj",
  "ff.net.2",
  "proj_in",
  "proj_out",
  "conv1",
  "conv2",
  "conv_shortcut",
  "time_emb_proj",
  "downsamplers.0.conv",
  "upsamplers.0.conv",
  "conv_in",
  "conv_out",
  "linear_1",
)


def random_lora(params, rank=3, targets=ATTENTION, seed=0, size=0.3) -> dict:
  """A LoRA with every factor far from 0; rank 3: no axis has the size of another."""
  fresh = lora.init_lora(jax.random.key(0), params, rank, targets)
  rng = np.random.default_rng(seed)

  def draw(leaf):  # of equal size whatever the layer's width
    fan_in = np.prod(leaf.shape[:-1]) ** 0.5
    return np.float32(rng.standard_normal(leaf.shape) * size * 4 / fan_in)

  return jax.tree.map(draw, fresh)


def draw_inputs(seed=1, width=24) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Latents (1, 6, 8, 4), timesteps (1,) and context (1, 5, width)."""
  rng = np.random.default_rng(seed)
  return (
    rng.standard_normal((1, 6, 8, 4)).astype(np.float32),
    np.array([300]),
    rng.standard_normal((1, 5, width)).astype(np.float32),
  )


def predict_ours(pipeline, tree, inputs) -> np.ndarray:
  variables = {"params": pipeline.params["unet"], "lora": tree}
  return np.asarray(_apply(pipeline.unet, variables, *inputs))


@functools.partial(jax.jit, static_argnums=0)  # one program for equal UNets
def _apply(unet, variables, *inputs):
  return unet.apply(variables, *inputs)


def predict_torch(unet, inputs) -> np.ndarray:
  latents, timesteps, context = map(torch.from_numpy, inputs)
  with torch.no_grad():
    out = unet(latents.permute(0, 3, 1, 2), timesteps, context).sample
  return out.permute(0, 2, 3, 1).numpy()


def assert_same_predictions(pipeline, name, unet, inputs):
  """Our UNet under the LoRA `name` predicts what PyTorch's, which has it, predicts."""
  np.testing.assert_allclose(
    predict_ours(pipeline, load_lora(str(name)), inputs),
    predict_torch(unet, inputs),
    rtol=0,
    atol=1e-4,
  )
