"""White-box attacks on aligned toy models, and on the base model beside them.

Of a test CSV (`prompt_files.py`) --count unsafe prompts are taken, spread over it. Each
names the symbol that the attacker wants, and in which scene. The base model and each
LoRA draw, from the row's own noise, which no attack has seen,

  asked              the unsafe prompt as it is; the only one that names the symbol
  random embeddings  the scene's safe prompt and noise added to the padding after it, as
                     long as what the attack on embeddings adds: what any push does
  embeddings         the safe prompt and what equation (2) of `adversary.py` adds
  random words       the safe prompt and --slots words drawn from all words
  words              the safe prompt and up to --slots words found by equation (3)

All words of the tokenizer may be used, the symbol's own name too. The detector then
counts pictures with the symbol asked for and with any. Intervals are Wilson's at 95 %.

OUT/attack.json has figures, settings and every prompt found, which `generate` draws as
well; OUT/images the pictures; OUT/sheet.png the first eight prompts, a row for each row
of the table.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from safetydpo_jax import lora as lora_lib
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.pipeline import Pipeline, load_pipeline
from safetydpo_jax.formats.loras.load import load_loras
from safetydpo_jax.lora import LoraTree, Tree
from safetydpo_jax.runtime import machine, manifest
from safetydpo_jax.runtime.command_line import Repeated
from safetydpo_jax.sampling.renderer import fix_schedule, initial_noise, save_image
from safetydpo_jax.toyworld.experiments import adversary, attack_figures, stages
from safetydpo_jax.toyworld.experiments.aims import Aim, encode_pictures, read_aims
from safetydpo_jax.toyworld.experiments.attack_figures import Attack, ModelAttacks
from safetydpo_jax.toyworld.world import detector, scenes

MANIFEST = "attack.json"
# An attack of no steps is a control too: the safe prompt.
LEAST = {"count": 1, "slots": 1, "embedding_steps": 0, "word_steps": 0}
LEAST |= {"candidates": 1, "draws": 1}
# What attack.json says of the options, besides the prompts.
RECORDED = (*LEAST, "learning_rate", "sampler_steps", "guidance", "seed")


@dataclasses.dataclass(frozen=True)
class AttackOptions:
  """Optimises prompts until an aligned toy model draws symbols again."""

  model: str
  """toy, or the folder of a toy model"""
  prompts: Path
  """CSV written by toyworld.prompts"""
  out: Path
  """folder for the figures, the prompts found and the pictures"""
  lora: Repeated[tuple[str, ...]] = ()
  """L[:SCALE]; may be repeated: each is attacked by itself, after the base model"""
  count: int = 28
  """number of prompts to attack"""
  slots: int = 4
  """words or embeddings to add to each prompt"""
  embedding_steps: int = 120
  """steps of Adam on the embeddings"""
  learning_rate: float = 0.05
  """learning rate of the embeddings"""
  word_steps: int = 24
  """search steps, each of which changes one word"""
  candidates: int = 12
  """prompts to try in each search step"""
  draws: int = 3
  """noise draws for each prompt and step"""
  sampler_steps: int = stages.STEPS
  """sampling steps of the pictures that are judged"""
  guidance: float = stages.GUIDANCE
  """guidance scale of these pictures"""
  seed: int = 0
  """seed of all random draws"""

  def __post_init__(self):
    for name, least in LEAST.items():
      if (value := getattr(self, name)) < least:
        raise InputError(f"--{name} is {value}; expected {least} or more")
    if not 0 < self.learning_rate < math.inf:
      raise InputError(f"--learning_rate is {self.learning_rate}; expected above 0")
    if not math.isfinite(self.guidance):
      raise InputError(f"--guidance is {self.guidance}; expected a finite number")
    if not 0 <= self.seed < 2**32:
      raise InputError(f"--seed is {self.seed}; expected 0 to 2^32 - 1")


class Attacked(NamedTuple):
  """One way to ask a model for all aims."""

  kind: str
  token_ids: jax.Array  # (n, l) int32
  offsets: jax.Array  # (n, k, d), added to the embeddings of the slots
  words: np.ndarray | None = None  # (n, k) int32, in the slots


class Setting(NamedTuple):
  """What the attacks on all models share."""

  pipeline: Pipeline
  params: Tree
  aims: list[Aim]
  task: adversary.Task
  noise: jax.Array  # (n, h, w, c), of the pictures that are judged
  vocabulary: np.ndarray  # (v,) int32
  optimizer: optax.GradientTransformation
  attacks: adversary.Attacks
  options: AttackOptions


def attack_models(options: AttackOptions) -> None:
  """Attacks the base model and each LoRA, then prints and writes the rates.

  Raises:
    InputError: the folder holds another attack, or the model, a LoRA or the prompts
      cannot be read or do not fit.
  """
  if (options.out / MANIFEST).exists():
    raise InputError(f"{options.out / MANIFEST} exists; choose another --out")
  setting = prepare(options)
  loras = [{}, *(load_loras([name], setting.pipeline) for name in options.lora)]
  steps = options.embedding_steps + options.word_steps * (options.candidates + 1)
  pictures = len(setting.aims) * options.draws * steps * len(loras)
  models: list[ModelAttacks] = []
  with tqdm(total=pictures, unit="denoised") as progress:
    for number, (name, lora) in enumerate(zip([None, *options.lora], loras)):
      progress.set_description(name or "base")
      folder = f"images/lora_{number}" if number else "images/base"
      on_device = jax.tree.map(jnp.asarray, lora)
      models.append(
        {
          "lora": name,
          "lora_sha256": lora_lib.factors_sha256(lora),
          "folder": folder,
          "rates": [
            judge(setting, on_device, options.out / folder, asked)
            for asked in attack(setting, on_device, progress)
          ],
        }
      )
  attack_figures.write_sheet(options.out, models)
  manifest.write_json(
    options.out / MANIFEST,
    {
      "model": setting.pipeline.name,
      "base": setting.pipeline.fingerprint,
      "prompts": str(options.prompts),
      "prompts_sha256": hashlib.sha256(options.prompts.read_bytes()).hexdigest(),
      **{name: getattr(options, name) for name in RECORDED},
      "vocabulary": len(setting.vocabulary),
      "threshold": detector.THRESHOLD,
      "models": models,
      "machine": machine.describe(),
      "versions": manifest.versions(),
    },
  )
  print(f"{attack_figures.table(models)}\n\n{options.out / MANIFEST}")


def prepare(options: AttackOptions) -> Setting:
  """Reads the model and the prompts.

  Raises:
    InputError: the model is not a toy model, or the prompts do not fit it.
  """
  aims = read_aims(options.prompts, options.out, options.count)
  pipeline = fix_schedule(load_pipeline(options.model))
  if pipeline.resolution != scenes.SIZE:
    raise InputError(
      f"--model {options.model} draws {pipeline.resolution} pixels a side; expected a "
      f"toy model, which draws {scenes.SIZE}"
    )
  params = jax.tree.map(jnp.asarray, pipeline.params)
  latents = encode_pictures(pipeline, params, aims)
  prompts = [scenes.caption(aim.scene) for aim in aims]
  vocabulary = adversary.attackable_words(pipeline.tokenizers[0])
  optimizer = optax.adam(options.learning_rate)
  return Setting(
    pipeline=pipeline,
    params=params,
    aims=aims,
    task=adversary.make_task(pipeline, prompts, latents, options.slots),
    noise=initial_noise([aim.row.seed for aim in aims], latents.shape[1:]),
    vocabulary=vocabulary,
    optimizer=optimizer,
    attacks=adversary.make_attacks(
      pipeline,
      vocabulary,
      optimizer,
      draws_per_step=options.draws,
      candidates=options.candidates,
      sampler_steps=options.sampler_steps,
      guidance=options.guidance,
    ),
    options=options,
  )


def attack(setting: Setting, lora: LoraTree, progress: tqdm) -> Iterator[Attacked]:
  """Asks one model in every way that this module lists, in that order.

  Args:
    lora: a LoRA tree, {} for the base model.
    progress: counts pictures denoised.
  """
  options, task, attacks = setting.options, setting.task, setting.attacks
  names = ("embeddings", "words", "random embeddings", "random words")
  keys = dict(zip(names, jax.random.split(jax.random.key(options.seed), len(names))))
  (asked,) = setting.pipeline.tokenize([aim.row.prompt for aim in setting.aims])
  width = setting.pipeline.text_encoders[0].config["hidden_size"]
  zeros = jnp.zeros((*task.slots.shape, width))
  yield Attacked("asked", jnp.asarray(asked), zeros)

  carry = zeros, setting.optimizer.init(zeros)
  for step in range(options.embedding_steps):
    key = jax.random.fold_in(keys["embeddings"], step)
    carry = attacks.embedding_step(setting.params, lora, task, carry, key)
    jax.block_until_ready(carry)
    progress.update(len(zeros) * options.draws)
  offsets = carry[0]
  push = jax.random.normal(keys["random embeddings"], zeros.shape)
  push /= jnp.linalg.norm(push, axis=-1, keepdims=True)
  push *= jnp.linalg.norm(offsets, axis=-1, keepdims=True)
  yield Attacked("random embeddings", task.token_ids, push)
  yield Attacked("embeddings", task.token_ids, offsets)

  words = jax.random.choice(
    keys["random words"], jnp.asarray(setting.vocabulary), task.slots.shape
  )
  ids = adversary.put(task.token_ids, task.slots, words)
  yield Attacked("random words", ids, zeros, np.asarray(words))
  padding = setting.pipeline.tokenizers[0].eos_token_id
  words = jnp.full(task.slots.shape, padding, jnp.int32)
  for step in range(options.word_steps):
    key = jax.random.fold_in(keys["words"], step)
    words = attacks.word_step(setting.params, lora, task, words, key)
    jax.block_until_ready(words)
    progress.update(len(zeros) * options.draws * (options.candidates + 1))
  ids = adversary.put(task.token_ids, task.slots, words)
  yield Attacked("words", ids, zeros, np.asarray(words))


def judge(setting: Setting, lora: LoraTree, folder: Path, attacked: Attacked) -> Attack:
  """Draws one kind of prompt by one model, saves the pictures, counts symbols."""
  arguments = (attacked.token_ids, setting.task.slots, attacked.offsets, setting.noise)
  pixels = np.asarray(setting.attacks.draw(setting.params, lora, *arguments))
  for number, image in enumerate(pixels):
    save_image(attack_figures.picture(folder, attacked.kind, number), image)
  prompts = [aim.row.prompt for aim in setting.aims]
  if attacked.kind != "asked":
    prompts = [scenes.caption(aim.scene) for aim in setting.aims]
  if attacked.words is not None:
    tokenizer = setting.pipeline.tokenizers[0]
    padding = tokenizer.eos_token_id
    texts = [adversary.spell(tokenizer, w[w != padding]) for w in attacked.words]
    prompts = [" ".join(parts).strip() for parts in zip(prompts, texts)]
  return attack_figures.rates(
    attacked.kind,
    [(prompt, aim.row.seed, aim.concept) for prompt, aim in zip(prompts, setting.aims)],
    np.round(pixels * 255).astype(np.uint8),
  )
