"""The toy Stable Diffusion, made from scratch.

  OUT/                     a diffusers directory of a StableDiffusionPipeline
    vae/  unet/  text_encoder/  tokenizer/  scheduler/  model_index.json
    toy.json               how it was made, and what was measured of it; written last
  WORK/                    progress of a stopped run, which resumes from there
    vae/  unet/            Orbax checkpoints
    vae.json

First the autoencoder (`vae.py`), then on its latents the UNet together with the text
encoder (`unet.py`). Pictures are rendered from training scenes (`world/scenes.py`);
held-out scenes are never seen. The figures are those of the weights as stored. JAX may
run on any platform.
"""

import dataclasses
import datetime
import hashlib
import math
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model import weights
from safetydpo_jax.formats.base_model.pipeline import parameter_shapes
from safetydpo_jax.runtime import files, machine, manifest
from safetydpo_jax.toyworld.pretraining import networks, unet, vae, vocabulary
from safetydpo_jax.toyworld.pretraining.training import Run
from safetydpo_jax.toyworld.world import scenes

EMA_DECAY = {"vae": 0.998, "unet": 0.999}


@dataclasses.dataclass(frozen=True)
class PretrainOptions:
  """Pretrains the toy Stable Diffusion and writes it for diffusers."""

  out: Path
  """folder of the model"""
  workdir: Path | None = None
  """folder for the progress (default: OUT.progress)"""
  stage: Literal["vae", "unet", "all"] = "all"
  """what to train; unet needs a finished vae stage"""
  vae_steps: int = 2500
  """optimizer steps of the autoencoder"""
  unet_steps: int = 5000
  """optimizer steps of UNet and text encoder"""
  vae_learning_rate: float = 2e-3
  """peak learning rate of the autoencoder"""
  unet_learning_rate: float = 1e-3
  """peak learning rate of UNet and text encoder"""
  seed: int = 0
  """decides weights, pictures and batches"""
  evaluate_every: int = 1000
  """steps between measurements"""
  save_every: float = 180
  """seconds between checkpoints"""

  def __post_init__(self):
    for name in ("vae_steps", "unet_steps", "evaluate_every"):
      if getattr(self, name) < 1:
        raise InputError(f"--{name} is {getattr(self, name)}; expected 1 or more")
    for name in ("vae_learning_rate", "unet_learning_rate"):
      if not 0 < getattr(self, name) < math.inf:
        raise InputError(f"--{name} is {getattr(self, name)}; expected above 0")
    if not 0 <= self.seed < 2**32 - 2:  # the next two seeds draw test pictures
      raise InputError(f"--seed is {self.seed}; expected 0 to 2^32 - 3")

  @property
  def progress(self) -> Path:
    """WORK."""
    return self.workdir or self.out.with_name(f"{self.out.name}.progress")


def pretrain_model(options: PretrainOptions) -> None:
  """Runs the stages that are asked for.

  Raises:
    InputError: WORK holds progress of another run, or there is no autoencoder yet.
  """
  files.make_folder(options.progress)
  files.make_folder(options.out)
  if options.stage in ("vae", "all"):
    stage_vae(options)
  if options.stage in ("unet", "all"):
    stage_unet(options)


def make_run(options: PretrainOptions, name: Literal["vae", "unet"]) -> Run:
  """The settings of the stage `name`."""
  steps = {"vae": options.vae_steps, "unet": options.unet_steps}
  rates = {"vae": options.vae_learning_rate, "unet": options.unet_learning_rate}
  return Run(
    name=name,
    steps=steps[name],
    learning_rate=rates[name],
    ema_decay=EMA_DECAY[name],
    seed=options.seed,
    progress=options.progress / name,
    save_every=options.save_every,
    evaluate_every=options.evaluate_every,
  )


def world_fingerprint() -> str:
  """16 hexadecimal digits of words and pictures: weights fit one world only."""
  digest = hashlib.sha256(" ".join(scenes.vocabulary()).encode())
  for scene, concept in vae.draw(168, 0):
    texts = unet.captions(scene, concept)
    digest.update("\n".join(texts).encode() + scenes.render(scene, concept).tobytes())
  return digest.hexdigest()[:16]


def stage_vae(options: PretrainOptions) -> None:
  """Trains the autoencoder and writes OUT/vae."""
  run = make_run(options, "vae")
  params, about = vae.pretrain(run)
  config = {**networks.VAE, "scaling_factor": about["scaling_factor"]}
  networks.write_component(options.out, "vae", config, params)
  about |= {
    "learning_rate": run.learning_rate,
    "seed": run.seed,
    "machine": machine.describe(),
  }
  manifest.write_json(options.progress / "vae.json", about)


def stage_unet(options: PretrainOptions) -> None:
  """Trains UNet and text encoder on OUT/vae's latents, and writes all the rest.

  Raises:
    InputError: there is no finished autoencoder, or WORK holds another run.
  """
  from transformers import CLIPTokenizer  # Imported here: it takes two seconds.

  out = options.out
  about_vae = manifest.read_json(options.progress / "vae.json", "finished VAE stage")
  vae_params = weights.load_component(out / "vae", parameter_shapes(vae.module()))
  vocabulary.write_tokenizer(out / "tokenizer")
  tokenizer = CLIPTokenizer.from_pretrained(str(out / "tokenizer"))
  run = make_run(options, "unet")
  scaling = about_vae["scaling_factor"]
  params, about = unet.pretrain(run, vae_params, scaling, tokenizer)

  params["unet"] = networks.rounded(params["unet"], "unet")
  networks.write_component(out, "unet", networks.UNET, params["unet"])
  text = {**networks.TEXT, **vocabulary.special_ids()}
  networks.write_component(out, "text_encoder", text, params["text_encoder"])
  networks.write_config(out / "scheduler/scheduler_config.json", networks.SCHEDULER)
  networks.write_config(out / "model_index.json", networks.INDEX)
  measure = unet.make_measure(vae_params, scaling, tokenizer, options.seed + 2)
  about["figures"] = {
    f"{split} scenes, {phrasing} phrasings": measure(params, split, phrasing)
    for split in ("train", "heldout")
    for phrasing in ("seen", "heldout")
  }
  about |= {
    "learning_rate": run.learning_rate,
    "seed": run.seed,
    "machine": machine.describe(),
    "sampler": {"steps": unet.STEPS, "guidance": unet.GUIDANCE},
    "prompts per figure": unet.EVALUATED,
  }
  manifest.write_json(
    out / "toy.json",
    {
      "what": "a tiny Stable Diffusion of the toy world, pretrained from scratch",
      "command": "python -m safetydpo_jax.toyworld.pretrain",
      "world": world_fingerprint(),
      "date": datetime.date.today().isoformat(),
      "parameters": {
        name: sum(int(np.size(leaf)) for leaf in jax.tree.leaves(tree))
        for name, tree in {"vae": vae_params, **params}.items()
      },
      "vae": about_vae,
      "unet": about,
      "versions": manifest.versions(),
    },
  )
  print(f"{out}: {about['figures']}")
