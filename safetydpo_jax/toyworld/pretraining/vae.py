"""The toy world's autoencoder: images of the world to latents and back.

With μ, σ the encoder's posterior of an image x, and x̂ the decoding of a sample:

  loss = mean (x - x̂)² + 0.3 mean |x - x̂| + 2·10⁻⁴ mean KL(N(μ, σ²) ‖ N(0, 1))      (1)

with means over all numbers of an image or a latent. The KL keeps latents near unit
scale and makes the decoder tolerate small errors of the UNet. The scaling factor is one
over the standard deviation of the latents, measured.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from safetydpo_jax.lora import Tree
from safetydpo_jax.models.config import freeze
from safetydpo_jax.models.vae import AutoencoderKL
from safetydpo_jax.toyworld.pretraining import networks
from safetydpo_jax.toyworld.pretraining.training import Run, train
from safetydpo_jax.toyworld.world import detector, scenes, symbols
from safetydpo_jax.toyworld.world.scenes import Scene
from safetydpo_jax.toyworld.world.symbols import Concept

ABSOLUTE = 0.3
KL = 2e-4
BATCH = 32
IMAGES = 12_288
CHUNK = 256

Drawn = tuple[Scene, Concept | None]  # a picture


def draw(count: int, seed: int, split: str = "train") -> list[Drawn]:
  """`count` pictures, every other one with a symbol, all symbols equally often."""
  rng = np.random.default_rng(seed)
  concepts = symbols.CONCEPTS
  return [
    (
      scenes.sample_scene(rng, split),
      concepts[i // 2 % len(concepts)] if i % 2 else None,
    )
    for i in range(count)
  ]


def render(drawn: Sequence[Drawn]) -> np.ndarray:
  """The pictures of `draw`: (n, 32, 32, 3) uint8."""
  return np.stack([scenes.render(scene, concept) for scene, concept in drawn])


def to_network(images: jax.Array) -> jax.Array:
  """uint8 pixels → [-1, 1] float32."""
  return images.astype(jnp.float32) / 127.5 - 1.0


def to_pixels(images: jax.Array | np.ndarray) -> np.ndarray:
  """[-1, 1] → uint8 pixels."""
  return np.round(np.clip((np.asarray(images) + 1) * 127.5, 0, 255)).astype(np.uint8)


def module() -> AutoencoderKL:
  """The autoencoder without weights."""
  return AutoencoderKL(freeze(networks.VAE))


def initialise(model: nn.Module, seed: int, *inputs: jax.Array) -> Tree:
  """A fresh parameter tree of any of our networks."""
  return jax.jit(model.init)(jax.random.key(seed), *inputs)["params"]


def in_chunks(
  function: Callable[[np.ndarray], jax.Array], array: np.ndarray
) -> np.ndarray:
  """Applies a jitted function to CHUNK rows at a time; the last chunk is padded."""
  parts = []
  for start in range(0, len(array), CHUNK):
    rows = array[start : start + CHUNK]
    padded = np.concatenate([rows, np.repeat(rows[-1:], CHUNK - len(rows), axis=0)])
    parts.append(np.asarray(function(padded))[: len(rows)])
  return np.concatenate(parts)


@jax.jit
def _encode(params: Tree, images: jax.Array) -> Any:
  return module().apply({"params": params}, to_network(images), method="encode")


@jax.jit
def _decode(params: Tree, latents: jax.Array) -> Any:
  return module().apply({"params": params}, latents, method="decode")


def encode(params: Tree, images: np.ndarray) -> np.ndarray:
  """(n, 32, 32, 3) uint8 → moments (n, 8, 8, 8) float32."""
  return in_chunks(lambda rows: _encode(params, rows), images)


def decode(params: Tree, latents: np.ndarray) -> np.ndarray:
  """Unscaled latents (n, 8, 8, 4) → (n, 32, 32, 3) uint8."""
  return to_pixels(in_chunks(lambda rows: _decode(params, rows), latents))


def loss(params: Tree, key: jax.Array, images: jax.Array) -> jax.Array:
  """Equation (1) on a batch drawn from `images` (n, 32, 32, 3) uint8."""
  vae = module()
  rows_key, noise_key = jax.random.split(key)
  rows = jax.random.randint(rows_key, (BATCH,), 0, len(images))
  pixels = to_network(images[rows])
  moments: Any = vae.apply({"params": params}, pixels, method="encode")
  mean, log_variance = jnp.split(moments, 2, axis=-1)
  log_variance = jnp.clip(log_variance, -30.0, 20.0)
  noise = jax.random.normal(noise_key, mean.shape)
  latents = mean + jnp.exp(0.5 * log_variance) * noise
  decoded: Any = vae.apply({"params": params}, latents, method="decode")
  error = decoded - pixels
  divergence = 0.5 * (mean**2 + jnp.exp(log_variance) - 1.0 - log_variance)
  return (error**2).mean() + ABSOLUTE * jnp.abs(error).mean() + KL * divergence.mean()


def figures(params: Tree, seed: int, count: int = 504) -> dict[str, float]:
  """How well held-out pictures are reconstructed, as shares and RMS grey levels."""
  drawn = draw(count, seed, "heldout")
  images = render(drawn)
  mean, log_variance = np.split(encode(params, images), 2, axis=-1)
  noise = np.random.default_rng(seed).standard_normal(mean.shape, np.float32)
  again = decode(params, mean + np.exp(0.5 * log_variance) * noise)
  found = detector.detect_symbols(again)
  asked = np.asarray([-1 if concept is None else concept.index for _, concept in drawn])
  read = detector.read_scene(again).scenes
  right = detector.attributes_right(read, [scene for scene, _ in drawn])
  departure = (again.astype(np.float32) - images) ** 2
  return {
    "symbol right": float((found.concept == asked)[asked >= 0].mean()),
    "symbol in safe": float((found.concept >= 0)[asked < 0].mean()),
    "lowest symbol score": float(found.score[asked >= 0].min()),
    "scene right": float(right["scene"].mean()),
    "error rms": float(np.sqrt(departure.mean())),
  }


def scaling_factor(moments: np.ndarray) -> float:
  """One over the standard deviation of the posterior's samples."""
  mean, log_variance = np.split(moments, 2, axis=-1)
  return round(float((mean.var() + np.exp(log_variance).mean()) ** -0.5), 5)


def pretrain(run: Run) -> tuple[Tree, dict[str, Any]]:
  """Trains the autoencoder; returns its weights as stored, and what was measured."""
  images = render(draw(IMAGES, run.seed))
  params = initialise(module(), run.seed, jnp.zeros((1, scenes.SIZE, scenes.SIZE, 3)))

  def evaluate(ema: Tree, step: int) -> None:
    measured = {k: round(v, 4) for k, v in figures(ema, run.seed + 1).items()}
    print(f"{run.name} step {step}: {measured}", flush=True)

  params, about = train(run, params, loss, images, evaluate)
  params = networks.rounded(params, "vae")
  about["figures"] = figures(params, run.seed + 1)
  about["scaling_factor"] = scaling_factor(encode(params, images[:2048]))
  return params, about
