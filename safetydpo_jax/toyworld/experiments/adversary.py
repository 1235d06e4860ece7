"""White-box attacks on a model: prompts optimised until it draws a symbol again.

The attacker has all weights, aligned or not, and for each prompt a picture with the
symbol, as latents x_0. With e_θ equation (1) of `dpo.py`, p a prompt, D draws of noise
and T timesteps in all,

  (1)  E(p) = mean over d < D of e_θ(x_0; c(p), t_d, ε_d),   t_d = ⌊T (d + u_d) / D⌋

the error of denoising that picture, small where the model would draw it. The prompt is
a safe one and k slots after its last word, padding at first. Two ways down from there:

  (2)  embeddings: v ← Adam(∇_v E), where v (k, d) is added to the token embeddings of
       the slots; no words, so an upper bound on what any k words can do
  (3)  words: B candidates differ from the prompt in one word, or have one more at its
       end; each is drawn from the q words w with the least <∂E/∂embedding, table_w>,
       and the candidate with the least E replaces the prompt, if it has less

Draws are fresh at every step, and shared by all candidates of a step.

Sources: Zhang et al. 2023 (UnlearnDiffAtk, arXiv 2310.11868) and Chin et al. 2023 (P4D,
arXiv 2309.06135) for (1), Zou et al. 2023 (greedy coordinate gradient, arXiv
2307.15043) for (3).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from safetydpo_jax import dpo
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.pipeline import Pipeline
from safetydpo_jax.lora import LoraTree, Tree
from safetydpo_jax.models import clip
from safetydpo_jax.sampling.guidance import guided
from safetydpo_jax.sampling.methods import make_sampler

if TYPE_CHECKING:
  from transformers import CLIPTokenizer

TOP = 32  # q of equation (3)


class Task(NamedTuple):
  """What is attacked: n prompts, and the picture that each is to bring back.

  Attributes:
    token_ids: (n, l) int32 of the safe prompts.
    slots: (n, k) int32, their positions in `token_ids`.
    latents: (n, h, w, c) float32, clean, of pictures with the symbol.
  """

  token_ids: jax.Array
  slots: jax.Array
  latents: jax.Array


class Attacks(NamedTuple):
  """Jitted; the first two arguments are always the parameters and a LoRA tree.

  Attributes:
    embedding_step: (…, task, (offsets (n, k, d), state), key) → the same pair, after
      one step of (2).
    word_step: (…, task, words (n, k) int32, key) → words after one step of (3).
    draw: (…, token_ids (n, l), slots (n, k), offsets (n, k, d), noise (n, h, w, c)) →
      images (n, H, W, 3) in [0, 1], by DDIM with guidance.
  """

  embedding_step: Callable
  word_step: Callable
  draw: Callable


def attackable_words(tokenizer: "CLIPTokenizer") -> np.ndarray:
  """Ids of the words: tokens whose text, alone or among others, gives them back.

  Pieces of words are left out, as no text has them; so are the start and end tokens.
  """
  special = set(tokenizer.all_special_ids)
  words = []
  for token in range(len(tokenizer)):
    text = spell(tokenizer, [token])
    again = tokenizer(text, add_special_tokens=False)["input_ids"]
    if text.isprintable() and again == [token] and token not in special:
      words.append(token)
  return np.array(words, np.int32)


def spell(tokenizer: "CLIPTokenizer", words: Iterable[int]) -> str:
  """The text of `attackable_words`; tokenizing it gives them back."""
  return " ".join(str(tokenizer.decode([word])).strip() for word in words)


def make_task(
  pipeline: Pipeline, prompts: Sequence[str], latents: jax.Array, slots: int
) -> Task:
  """Safe prompts with k slots after the last word of each.

  Raises:
    InputError: a prompt has no room for them, or the model has two text encoders.
  """
  if len(pipeline.text_encoders) > 1:
    raise InputError(f"{pipeline.name} has two text encoders; expected one")
  (ids,) = pipeline.tokenize(prompts)
  first = (ids == pipeline.tokenizers[0].eos_token_id).argmax(axis=1)
  room = int(ids.shape[1] - 1 - first.max())  # the end token stays
  if not 1 <= slots <= room:
    raise InputError(
      f"--slots is {slots}; expected 1 to {room}, what fits after the prompts"
    )
  positions = first[:, None] + np.arange(slots)[None, :]
  return Task(jnp.asarray(ids), jnp.asarray(positions, jnp.int32), latents)


def put(ids: jax.Array, slots: jax.Array, words: jax.Array) -> jax.Array:
  """Token ids (n, l) with `words` (n, k) at positions `slots` (n, k)."""
  return ids.at[jnp.arange(len(ids))[:, None], slots].set(words)


def encode(
  pipeline: Pipeline, params: Tree, ids: jax.Array, slots: jax.Array, offsets: jax.Array
) -> jax.Array:
  """Context (n, l, d) of token ids, `offsets` (n, k, d) added to token embeddings."""

  def add(next_call, args, kwargs, context):
    out = next_call(*args, **kwargs)
    if context.module.name != "token_embedding":
      return out
    return out.at[jnp.arange(len(ids))[:, None], slots].add(offsets)

  with nn.intercept_methods(add):
    return clip.encode_text(pipeline.text_encoders, params, (ids,))[0]


def draws(
  key: jax.Array, shape: tuple[int, ...], count: int, timesteps: int
) -> tuple[jax.Array, jax.Array]:
  """Noise (n, D, h, w, c) and timesteps (n, D) of equation (1); shape (n, h, w, c)."""
  noise_key, time_key = jax.random.split(key)
  noise = jax.random.normal(noise_key, (shape[0], count, *shape[1:]))
  strata = jnp.arange(count)[None, :] + jax.random.uniform(time_key, (shape[0], count))
  return noise, (strata * timesteps / count).astype(jnp.int32)


def denoising_error(
  pipeline: Pipeline,
  params: Tree,
  lora: LoraTree,
  task: Task,
  words: jax.Array,
  offsets: jax.Array,
  noise: jax.Array,
  timesteps: jax.Array,
) -> jax.Array:
  """Equation (1), (n,) float32.

  Args:
    lora: a LoRA tree, {} for none.
    words: (n, k) int32, tokens of the slots; the padding token for none.
    offsets: (n, k, d), added to their embeddings.
    noise, timesteps: (n, D, h, w, c) and (n, D) int32, see `draws`.
  """
  ids = put(task.token_ids, task.slots, words)
  context = encode(pipeline, params, ids, task.slots, offsets)
  count, each = timesteps.shape
  errors = dpo.denoising_errors(
    lora,
    params["unet"],
    jnp.repeat(task.latents, each, axis=0)[:, None],
    jnp.repeat(context, each, axis=0),
    noise.reshape(count * each, *noise.shape[2:]),
    timesteps.reshape(-1),
    unet=pipeline.unet,
    schedule=pipeline.schedule,
  )
  return errors.reshape(count, each).mean(axis=1)


def make_attacks(
  pipeline: Pipeline,
  vocabulary: np.ndarray,
  optimizer: optax.GradientTransformation,
  *,
  draws_per_step: int,
  candidates: int,
  sampler_steps: int,
  guidance: float,
) -> Attacks:
  """The two attacks and the sampler they are judged by, as functions to call often.

  Args:
    pipeline: the model; its weights are not read here.
    vocabulary: ids that a slot may hold, (v,) int32.
    optimizer: of equation (2).
    draws_per_step: D of equation (1).
    candidates: B of equation (3).
    sampler_steps, guidance: of `draw`, which samples by DDIM as toy models do.
  """
  padding = pipeline.tokenizers[0].eos_token_id
  free = jnp.asarray(vocabulary)
  run = make_sampler("ddim", pipeline.schedule, sampler_steps)
  (null_ids,) = pipeline.tokenize([""])

  def of_task(params, lora, task, key):
    noise, times = draws(
      key, task.latents.shape, draws_per_step, pipeline.schedule.num_timesteps
    )
    return lambda words, offsets: denoising_error(
      pipeline, params, lora, task, words, offsets, noise, times
    )

  def embedding_step(params, lora, task, carry, key):
    offsets, state = carry
    error = of_task(params, lora, task, key)
    nothing = jnp.full(task.slots.shape, padding)
    gradient = jax.grad(lambda offsets: error(nothing, offsets).sum())(offsets)
    updates, state = optimizer.update(gradient, state, offsets)
    return optax.apply_updates(offsets, updates), state

  def word_step(params, lora, task, words, key):
    draw_key, slot_key, choice_key = jax.random.split(key, 3)
    error = of_task(params, lora, task, draw_key)
    table = params["text_encoder"]["embeddings"]["token_embedding"]["embedding"]
    zeros = jnp.zeros((*words.shape, table.shape[1]))
    gradient = jax.grad(lambda offsets: error(words, offsets).sum())(zeros)
    slopes = jnp.einsum("nkd,vd->nkv", gradient, table[free])
    _, best = jax.lax.top_k(-slopes, min(TOP, len(vocabulary)))  # (n, k, q)

    count, slots = words.shape
    rows = jnp.arange(count)[:, None]
    # Padding only ever follows words: a slot beyond the last word becomes the next one.
    length = (words != padding).sum(axis=1)[:, None]
    slot = jax.random.randint(slot_key, (count, candidates), 0, slots)
    slot = jnp.minimum(slot, length)
    choice = jax.random.randint(choice_key, slot.shape, 0, best.shape[-1])
    tried = jnp.tile(words[:, None], (1, candidates, 1))
    columns = jnp.arange(candidates)[None, :]
    tried = tried.at[rows, columns, slot].set(free[best[rows, slot, choice]])
    tried = jnp.concatenate([words[:, None], tried], axis=1)  # (n, 1 + B, k)
    errors = jax.lax.map(lambda words: error(words, zeros), tried.swapaxes(0, 1))
    return tried[jnp.arange(count), errors.argmin(axis=0)]

  def draw(params, lora, ids, slots, offsets, noise):
    context = encode(pipeline, params, ids, slots, offsets)
    null, _ = clip.encode_text(pipeline.text_encoders, params, (null_ids,))

    def predict(latents, timesteps, context):
      variables = {"params": params["unet"], "lora": lora}
      return pipeline.unet.apply(variables, latents, timesteps, context)

    null = jnp.broadcast_to(null, context.shape)
    with_guidance = guided(predict, context, null, guidance)
    # DDIM draws no noise.
    clean = run(with_guidance, noise, None)  # type: ignore[arg-type]
    images: Any = pipeline.vae.apply(
      {"params": params["vae"]}, clean / pipeline.scaling_factor, method="decode"
    )
    return jnp.clip(images / 2 + 0.5, 0.0, 1.0)

  return Attacks(jax.jit(embedding_step), jax.jit(word_step), jax.jit(draw))
