"""White-box attacks on aligned models: `python -m safetydpo_jax.toyworld.attack`.

Of a test CSV (`prompts.py`) --count unsafe prompts are taken, spread over it. Each says
which symbol the attacker wants in which scene. The base model and each LoRA are drawn
with, from the row's own noise, which no attack has seen,

  asked              the unsafe prompt as it stands; the only one that names the symbol
  random embeddings  the scene's safe prompt and noise added to the padding after it, as
                     long as what the attack on embeddings adds: what any push does
  embeddings         the safe prompt and what equation (2) of `adversary.py` adds
  random words       the safe prompt and --slots words drawn from all words
  words              the safe prompt and up to --slots words found by equation (3)

All words of the tokenizer are free, the symbol's own name too. The detector then counts
pictures with the symbol asked for and with any. Intervals are Wilson's at 95 %.

OUT/attack.json has figures, settings and every prompt found, which `generate` draws as
well; OUT/images the pictures; OUT/sheet.png the first eight prompts, a row for each row
of the table.
"""

import argparse
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from safetydpo_jax import lora as lora_lib
from safetydpo_jax.data.prompts import Row, read_prompts
from safetydpo_jax.errors import InputError, run_command
from safetydpo_jax.formats.base_model.pipeline import Pipeline, load_pipeline
from safetydpo_jax.formats.loras.load import load_loras
from safetydpo_jax.runtime import manifest
from safetydpo_jax.sampling.renderer import fix_schedule, initial_noise, save_image
from safetydpo_jax.toyworld.experiments import adversary, attack_figures, stages
from safetydpo_jax.toyworld.pretrain import machine
from safetydpo_jax.toyworld.world import detector, scenes
from safetydpo_jax.toyworld.world.symbols import Concept

EXAMPLE = """example:
  python -m safetydpo_jax.toyworld.attack --model toy --lora demo/merged \\
    --prompts demo/prompts/test.csv --out attack
"""
MANIFEST = "attack.json"
# An attack of no steps is a control too: the safe prompt.
LEAST = {"count": 1, "slots": 1, "embedding_steps": 0, "word_steps": 0}
LEAST |= {"candidates": 1, "draws": 1}


class Aim(NamedTuple):
  """One picture that the attacker wants."""

  row: Row
  scene: scenes.Scene
  concept: Concept


class Attacked(NamedTuple):
  """One way to ask a model for all aims."""

  kind: str
  token_ids: jax.Array  # (n, l) int32
  offsets: jax.Array  # (n, k, d), added to the embeddings of the slots
  words: np.ndarray | None = None  # (n, k) int32, in the slots


class Setting(NamedTuple):
  """What all models have in common."""

  pipeline: Pipeline
  params: Any
  aims: list[Aim]
  task: adversary.Task
  noise: jax.Array  # (n, h, w, c), of the pictures that are judged
  vocabulary: np.ndarray  # (v,) int32
  optimizer: optax.GradientTransformation
  attacks: adversary.Attacks
  options: argparse.Namespace


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog="python -m safetydpo_jax.toyworld.attack",
    description="Optimises prompts until an aligned toy model draws symbols again.",
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--model", required=True, metavar="M", help="toy, or a folder of one")
  add(
    "--lora",
    action="append",
    default=[],
    metavar="L[:SCALE]",
    help="may be repeated: each is attacked alone, and the base model before them",
  )
  add("--prompts", required=True, type=Path, metavar="CSV", help="of toyworld.prompts")
  add("--out", required=True, type=Path, metavar="DIR", help="figures, prompts found")
  for name, value, what in (
    ("count", 28, "prompts attacked"),
    ("slots", 4, "words or embeddings added to each"),
    ("embedding_steps", 120, "of Adam"),
    ("learning_rate", 0.05, "of the embeddings"),
    ("word_steps", 24, "in each of which one word changes"),
    ("candidates", 12, "prompts tried in a step of words"),
    ("draws", 3, "of noise for each prompt and step"),
    ("sampler_steps", int(stages.STEPS), "of what is looked at"),
    ("guidance", float(stages.GUIDANCE), "of the same"),
    ("seed", 0, "of all draws"),
  ):
    text = f"{what} (default: {value})"
    add(f"--{name}", type=type(value), default=value, metavar="N", help=text)
  options = parser.parse_args(arguments)
  for name, least in LEAST.items():
    if (value := getattr(options, name)) < least:
      raise InputError(f"--{name} is {value}; expected {least} or more")
  if not 0 < options.learning_rate < np.inf:
    raise InputError(f"--learning_rate is {options.learning_rate}; expected above 0")
  if not np.isfinite(options.guidance):
    raise InputError(f"--guidance is {options.guidance}; expected a finite number")
  if not 0 <= options.seed < 2**32:
    raise InputError(f"--seed is {options.seed}; expected 0 to 2³² - 1")
  return options


def read_aims(file: Path, out: Path, count: int) -> list[Aim]:
  """`count` of the CSV's unsafe prompts, or all, spread evenly over it.

  Raises:
    InputError: if a prompt is not of the toy grammar, or none asks for a symbol.
  """
  aims = [Aim(row, *scenes.parse(row.prompt)) for row in read_prompts(file, out)]
  aims = [aim for aim in aims if aim.concept]
  if not aims:
    raise InputError(f"{file} has no prompt that asks for a symbol")
  chosen = np.linspace(0, len(aims) - 1, min(count, len(aims))).round()
  return [aims[int(place)] for place in chosen]


def encode_pictures(pipeline: Pipeline, params: Any, aims: list[Aim]) -> jax.Array:
  """Latents (n, h, w, c) of the pictures wanted, as drawn by `scenes.render`."""
  pixels = np.stack([scenes.render(aim.scene, aim.concept) for aim in aims])
  encode = jax.jit(
    lambda params, images: pipeline.vae.apply(
      {"params": params}, images, method="encode"
    )
  )
  moments = encode(params["vae"], pixels.astype(np.float32) / 127.5 - 1)
  return jnp.split(moments, 2, axis=-1)[0] * pipeline.scaling_factor


def prepare(options: argparse.Namespace) -> Setting:
  """Reads the model and the prompts."""
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


def attack(setting: Setting, lora: Any, progress: tqdm) -> Iterator[Attacked]:
  """Every kind of prompt against one model, as this module lists them.

  Args:
    lora: a LoRA tree, {} for the base model.
    progress: counts pictures denoised.
  """
  options, task, attacks = setting.options, setting.task, setting.attacks
  names = ("embeddings", "words", "random embeddings", "random words")
  keys = dict(zip(names, jax.random.split(jax.random.key(options.seed), len(names))))
  (asked,) = setting.pipeline.tokenize([aim.row.prompt for aim in setting.aims])
  width = setting.pipeline.text_encoders[0].config["hidden_size"]
  zeros = jnp.zeros((*task.places.shape, width))
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
    keys["random words"], jnp.asarray(setting.vocabulary), task.places.shape
  )
  ids = adversary.put(task.token_ids, task.places, words)
  yield Attacked("random words", ids, zeros, np.asarray(words))
  padding = setting.pipeline.tokenizers[0].eos_token_id
  words = jnp.full(task.places.shape, padding, jnp.int32)
  for step in range(options.word_steps):
    key = jax.random.fold_in(keys["words"], step)
    words = attacks.word_step(setting.params, lora, task, words, key)
    jax.block_until_ready(words)
    progress.update(len(zeros) * options.draws * (options.candidates + 1))
  ids = adversary.put(task.token_ids, task.places, words)
  yield Attacked("words", ids, zeros, np.asarray(words))


def judge(
  setting: Setting, lora: Any, folder: Path, attacked: Attacked
) -> dict[str, Any]:
  """Draws one kind of prompt by one model, saves the pictures, counts symbols."""
  arguments = (attacked.token_ids, setting.task.places, attacked.offsets, setting.noise)
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


def main(arguments: list[str] | None = None) -> None:
  """Attacks the base model and each LoRA, then prints and writes the rates."""
  options = parse_arguments(arguments)
  if (options.out / MANIFEST).exists():
    raise InputError(f"{options.out / MANIFEST} is there; choose another --out")
  setting = prepare(options)
  loras = [{}, *(load_loras([name], setting.pipeline) for name in options.lora)]
  steps = options.embedding_steps + options.word_steps * (options.candidates + 1)
  pictures = len(setting.aims) * options.draws * steps * len(loras)
  models = []
  with tqdm(total=pictures, unit="denoised") as progress:
    for number, (name, lora) in enumerate(zip([None, *options.lora], loras)):
      progress.set_description(name or "base")
      folder = f"images/lora_{number}" if number else "images/base"
      on_device = jax.tree.map(jnp.asarray, lora)
      rates = [
        judge(setting, on_device, options.out / folder, attacked)
        for attacked in attack(setting, on_device, progress)
      ]
      about = {
        "lora": name,
        "lora_sha256": lora_lib.factors_sha256(lora),
        "folder": folder,
      }
      models.append({**about, "rates": rates})
  attack_figures.write_sheet(options.out, models)
  manifest.write_json(
    options.out / MANIFEST,
    {
      "model": setting.pipeline.name,
      "base": setting.pipeline.fingerprint,
      "prompts": str(options.prompts),
      "prompts_sha256": hashlib.sha256(options.prompts.read_bytes()).hexdigest(),
      **{name: getattr(options, name) for name in (*LEAST, "learning_rate")},
      **{
        name: getattr(options, name) for name in ("sampler_steps", "guidance", "seed")
      },
      "vocabulary": len(setting.vocabulary),
      "threshold": detector.THRESHOLD,
      "models": models,
      "machine": machine(),
      "versions": manifest.versions(),
    },
  )
  print(f"{attack_figures.table(models)}\n\n{options.out / MANIFEST}")


if __name__ == "__main__":
  run_command(main)
