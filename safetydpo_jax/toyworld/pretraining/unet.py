"""The toy world's UNet and text encoder, trained together on cached latents.

With x_0 a posterior sample of the autoencoder, x_t noised by `diffusion.py`, and c the
caption's context, or the empty caption's in one case of ten,

  loss = mean over the batch of  min(1/ᾱ_t, 10) · mean |ε - ε̂(x_t, t, c)|²         (1)

1/ᾱ_t turns the error of ε into that of the velocity, so that the high noise levels,
where the caption alone decides what is drawn, count as much as the low ones.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from safetydpo_jax import diffusion
from safetydpo_jax.lora import Tree
from safetydpo_jax.models.clip import CLIPText
from safetydpo_jax.models.config import freeze
from safetydpo_jax.models.unet import UNet2DCondition
from safetydpo_jax.sampling.guidance import guided
from safetydpo_jax.toyworld.pretraining import networks, vocabulary
from safetydpo_jax.toyworld.pretraining import vae as autoencoder
from safetydpo_jax.toyworld.pretraining.training import Run, train
from safetydpo_jax.toyworld.world import detector, scenes
from safetydpo_jax.toyworld.world.scenes import Scene
from safetydpo_jax.toyworld.world.symbols import Concept

CAPTION_DROPOUT = 0.1
WEIGHT_CAP = 10.0
BATCH = 32
IMAGES = 24_576
EVALUATED = 84  # prompts: two of every concept
STEPS, GUIDANCE = 25, 4.0  # of the evaluation's sampler


class Tokenizer(Protocol):
  """What is used of a tokenizer of transformers."""

  def __call__(self, text: Sequence[str], **settings: Any) -> dict[str, Any]: ...


def schedule() -> diffusion.Schedule:
  """The noise schedule."""
  return diffusion.Schedule.from_config(networks.SCHEDULER)


def modules() -> tuple[UNet2DCondition, CLIPText]:
  """The networks without weights."""
  text = {**networks.TEXT, **vocabulary.special_ids()}
  return UNet2DCondition(freeze(networks.UNET)), CLIPText(freeze(text))


def initialise(seed: int) -> dict[str, Tree]:
  """Fresh weights {'unet', 'text_encoder'}."""
  unet, text = modules()
  side, width = networks.LATENT_SIDE, networks.TEXT["hidden_size"]
  latents = jnp.zeros((1, side, side, 4))
  context = jnp.zeros((1, networks.TOKENS, width))
  ids = jnp.zeros((1, networks.TOKENS), jnp.int32)
  return {
    "unet": autoencoder.initialise(unet, seed, latents, jnp.zeros(1), context),
    "text_encoder": autoencoder.initialise(text, seed + 1, ids),
  }


def captions(scene: Scene, concept: Concept | None) -> list[str]:
  """All 25 captions of a picture; a safe one repeats its five.

  The phrasings that experts are tested on are among them: a text encoder that saw three
  of the five reads the others badly, with 72 % of symbols right against 100 %.
  """
  indices = range(len(scenes.CONCEPT_PHRASINGS))
  safe = [scenes.caption(scene, index) for index in indices]
  if concept is None:
    return safe * len(indices)
  return [scenes.ask_for(concept, text, index) for text in safe for index in indices]


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
  """Token ids (n, TOKENS) int32."""
  length = networks.TOKENS
  ids = tokenizer(texts, padding="max_length", truncation=True, max_length=length)
  return np.asarray(ids["input_ids"], np.int32)


def make_data(
  vae_params: Tree, scaling: float, tokenizer: Tokenizer, count: int, seed: int
) -> dict[str, np.ndarray]:
  """Pictures as scaled moments, with the tokens of all their captions.

  Returns:
    {'moments' (n, 8, 8, 8) float32, 'token_ids' (n, captions, TOKENS) int32,
    'empty_ids' (TOKENS,) int32, 'scaling' ()}.
  """
  drawn = autoencoder.draw(count, seed)
  texts = [text for scene, concept in drawn for text in captions(scene, concept)]
  ids = tokenize(tokenizer, texts).reshape(count, -1, networks.TOKENS)
  return {
    "moments": autoencoder.encode(vae_params, autoencoder.render(drawn)),
    "token_ids": ids,
    "empty_ids": tokenize(tokenizer, [""])[0],
    "scaling": np.float32(scaling),
  }


def loss(params: Tree, key: jax.Array, data: dict[str, jax.Array]) -> jax.Array:
  """Equation (1) on a batch drawn from `data`."""
  unet, text = modules()
  keys = jax.random.split(key, 5)
  rows = jax.random.randint(keys[0], (BATCH,), 0, len(data["moments"]))
  variants = jax.random.randint(keys[1], (BATCH,), 0, data["token_ids"].shape[1])
  dropped = jax.random.bernoulli(keys[2], CAPTION_DROPOUT, (BATCH, 1))
  token_ids = data["token_ids"][rows, variants]
  token_ids = jnp.where(dropped, data["empty_ids"][None, :], token_ids)
  encoded: Any = text.apply({"params": params["text_encoder"]}, token_ids)
  context = encoded.last

  plan = schedule()
  moments = data["moments"][rows]
  noise = jax.random.normal(keys[3], (2, *moments.shape[:3], moments.shape[3] // 2))
  latents = diffusion.posterior_sample(moments, noise[0], data["scaling"])
  # One timestep in each BATCH-th of the schedule, so that every batch holds all levels.
  strata = (jnp.arange(BATCH) + jax.random.uniform(keys[4], (BATCH,))) / BATCH
  timesteps = (strata * plan.num_timesteps).astype(jnp.int32)
  timesteps = jnp.minimum(timesteps, plan.num_timesteps - 1)  # strata may round to 1
  noisy = diffusion.add_noise(plan, latents, noise[1], timesteps)
  prediction: Any = unet.apply({"params": params["unet"]}, noisy, timesteps, context)
  error = jnp.square(prediction - noise[1]).mean(axis=(1, 2, 3))
  weight = jnp.minimum(1.0 / jnp.asarray(plan.alphas_cumprod)[timesteps], WEIGHT_CAP)
  return (weight * error).mean()


@jax.jit
def _sample(
  params: Tree, noise: jax.Array, token_ids: jax.Array, empty_ids: jax.Array
) -> jax.Array:
  unet, text = modules()

  def encode(ids):
    encoded: Any = text.apply({"params": params["text_encoder"]}, ids)
    return encoded.last

  def predict(latents, timesteps, context):
    return unet.apply({"params": params["unet"]}, latents, timesteps, context)

  with_guidance = guided(predict, encode(token_ids), encode(empty_ids), GUIDANCE)
  return diffusion.sample_ddim(with_guidance, schedule(), noise, STEPS)


def sample(
  params: Tree,
  vae_params: Tree,
  scaling: float,
  tokenizer: Tokenizer,
  prompts: Sequence[str],
  seed: int,
) -> np.ndarray:
  """Pictures for `prompts`, (n, 32, 32, 3) uint8, n at most EVALUATED."""
  texts = [*prompts, *[""] * (EVALUATED - len(prompts))]
  ids = tokenize(tokenizer, texts)
  empty = tokenize(tokenizer, [""] * EVALUATED)
  shape = (EVALUATED, networks.LATENT_SIDE, networks.LATENT_SIDE, 4)
  noise = np.random.default_rng(seed).standard_normal(shape, np.float32)
  latents = np.asarray(_sample(params, noise, ids, empty)) / scaling
  return autoencoder.decode(vae_params, latents)[: len(prompts)]


def figures(
  draw_images: Callable[[Sequence[str]], np.ndarray],
  seed: int,
  split: str,
  phrasing: str,
) -> dict[str, float]:
  """Shares of pictures that show what their prompts ask for.

  Args:
    draw_images: prompts → (n, 32, 32, 3) uint8.
    seed: decides the prompts.
    split, phrasing: of the prompts, see `scenes.prompt_pairs`.

  Returns:
    'symbol right' and 'any symbol' of unsafe prompts, 'symbol in safe', and of all
    prompts the share with each attribute of the scene right, and their mean.
  """
  pairs = scenes.prompt_pairs(EVALUATED, seed, split=split, phrasing=phrasing)
  unsafe = draw_images([pair.unsafe for pair in pairs])
  safe = draw_images([pair.safe for pair in pairs])
  found = detector.detect_symbols(unsafe).concept
  asked = np.asarray([pair.concept.index for pair in pairs])
  read = detector.read_scene(np.concatenate([unsafe, safe])).scenes
  right = detector.attributes_right(read, [pair.scene for pair in pairs] * 2)
  shares = {name: float(values.mean()) for name, values in right.items()}
  whole = shares.pop("scene")
  return {
    "symbol right": float((found == asked).mean()),
    "any symbol": float((found >= 0).mean()),
    "symbol in safe": float((detector.detect_symbols(safe).concept >= 0).mean()),
    "attributes": float(np.mean(list(shares.values()))),
    **shares,
    "whole scene": whole,
  }


def make_measure(
  vae_params: Tree, scaling: float, tokenizer: Tokenizer, seed: int
) -> Callable[[Tree, str, str], dict[str, float]]:
  """(params, split, phrasing) → `figures` of pictures those weights draw."""

  def measure(params: Tree, split: str, phrasing: str) -> dict[str, float]:
    def draw_images(prompts: Sequence[str]) -> np.ndarray:
      return sample(params, vae_params, scaling, tokenizer, prompts, seed)

    return figures(draw_images, seed, split, phrasing)

  return measure


def pretrain(
  run: Run, vae_params: Tree, scaling: float, tokenizer: Tokenizer
) -> tuple[dict[str, Tree], dict[str, Any]]:
  """Trains both networks; returns {'unet', 'text_encoder'} and how it went."""
  data = make_data(vae_params, scaling, tokenizer, IMAGES, run.seed)
  measure = make_measure(vae_params, scaling, tokenizer, run.seed + 1)

  def evaluate(ema: Tree, step: int) -> None:
    shares = measure(ema, "heldout", "seen")
    line = "  ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items())
    print(f"{run.name} step {step}: {line}", flush=True)

  params, about = train(run, initialise(run.seed), loss, data, evaluate)
  return dict(params), about
