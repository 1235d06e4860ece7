"""Makes the toy Stable Diffusion: `python -m safetydpo_jax.toyworld.pretrain`.

  OUT/                     a diffusers directory of a StableDiffusionPipeline
    vae/  unet/  text_encoder/  tokenizer/  scheduler/  model_index.json
    toy.json               how it was made, and what was measured of it; written last
  WORK/                    progress of a stopped run, which goes on from there
    vae.npz  unet.npz  vae.json

First the autoencoder (`pretraining/vae.py`), then on its latents the UNet together with
the text encoder (`pretraining/unet.py`). Pictures are rendered from `scenes.py`:
held-out scenes are never seen. The figures are those of the weights as stored. A JAX of
any platform will do.
"""

import argparse
import datetime
import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import jax
import numpy as np

from safetydpo_jax.errors import run_command
from safetydpo_jax.formats.base_model import weights
from safetydpo_jax.formats.base_model.pipeline import parameter_shapes
from safetydpo_jax.runtime import manifest
from safetydpo_jax.toyworld.pretraining import networks, unet, vae, vocabulary
from safetydpo_jax.toyworld.pretraining.training import Run
from safetydpo_jax.toyworld.world import scenes

EXAMPLE = """example:
  python -m safetydpo_jax.toyworld.pretrain --out toy-model
"""


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog="python -m safetydpo_jax.toyworld.pretrain",
    description="Pretrains the toy Stable Diffusion and writes it for diffusers.",
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--out", required=True, type=Path, metavar="DIR")
  parser.add_argument(
    "--workdir", type=Path, metavar="WORK", help="progress; DIR.progress by default"
  )
  parser.add_argument("--stage", default="all", choices=["vae", "unet", "all"])
  parser.add_argument("--vae_steps", type=int, default=2500)
  parser.add_argument("--unet_steps", type=int, default=5000)
  parser.add_argument("--vae_learning_rate", type=float, default=2e-3)
  parser.add_argument("--unet_learning_rate", type=float, default=1e-3)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--evaluate_every", type=int, default=1000, metavar="STEPS")
  parser.add_argument("--save_every", type=float, default=180, metavar="SECONDS")
  options = parser.parse_args(arguments)
  options.workdir = options.workdir or options.out.with_name(
    f"{options.out.name}.progress"
  )
  return options


def make_run(options: argparse.Namespace, name: str, ema_decay: float) -> Run:
  """The settings of the stage `name`."""
  return Run(
    name=name,
    steps=getattr(options, f"{name}_steps"),
    learning_rate=getattr(options, f"{name}_learning_rate"),
    ema_decay=ema_decay,
    seed=options.seed,
    progress=options.workdir / f"{name}.npz",
    save_every=options.save_every,
    evaluate_every=options.evaluate_every,
  )


def world_fingerprint() -> str:
  """16 hexadecimal digits of words and pictures: weights are of one world only."""
  digest = hashlib.sha256(" ".join(scenes.vocabulary()).encode())
  for scene, concept in vae.draw(168, 0):
    texts = unet.captions(scene, concept)
    digest.update("\n".join(texts).encode() + scenes.render(scene, concept).tobytes())
  return digest.hexdigest()[:16]


def machine() -> dict[str, Any]:
  """What the run ran on."""
  device = jax.devices()[0]
  return {
    "platform": device.platform,
    "device": device.device_kind,
    "architecture": platform.machine(),
    "cores": len(os.sched_getaffinity(0)),
  }


def stage_vae(options: argparse.Namespace) -> None:
  """Trains the autoencoder and writes OUT/vae."""
  run = make_run(options, "vae", 0.998)
  params, about = vae.pretrain(run)
  config = {**networks.VAE, "scaling_factor": about["scaling_factor"]}
  networks.write_component(options.out, "vae", config, params)
  about |= {"learning_rate": run.learning_rate, "seed": run.seed, "machine": machine()}
  manifest.write_json(options.workdir / "vae.json", about)


def stage_unet(options: argparse.Namespace) -> None:
  """Trains UNet and text encoder on OUT/vae's latents, and writes all the rest."""
  from transformers import CLIPTokenizer  # Imported here: it takes two seconds.

  out = options.out
  about_vae = manifest.read_json(options.workdir / "vae.json", "finished VAE stage")
  vae_params = weights.load_component(out / "vae", parameter_shapes(vae.module()))
  vocabulary.write_tokenizer(out / "tokenizer")
  tokenizer = CLIPTokenizer.from_pretrained(str(out / "tokenizer"))
  run = make_run(options, "unet", 0.999)
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
    "machine": machine(),
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


STAGES = {
  "vae": (stage_vae,),
  "unet": (stage_unet,),
  "all": (stage_vae, stage_unet),
}


def main(arguments: list[str] | None = None) -> None:
  """Runs the stages asked for."""
  options = parse_arguments(arguments)
  options.workdir.mkdir(parents=True, exist_ok=True)
  options.out.mkdir(parents=True, exist_ok=True)
  for stage in STAGES[options.stage]:
    stage(options)


if __name__ == "__main__":
  run_command(main)
