"""Our train step beside a PyTorch one: `python -m benchmarks.train_step`.

Three contenders train SD1.5 at rank 4 on random weights and random pairs:

  ours           `training.step.jit_train_step`, cached VAE moments, one UNet
  torch cached   diffusers + peft + AdamW, cached latents, a second UNet as reference
  torch online   the same, and the VAE encodes both images in each step, as the code
                 released with SafetyDPO does

Each is a process of its own and only one lives at a time; they take turns, so a
machine that slows down slows all of them. A row gives the median step over all turns.
Each turn's first step (compilation, allocation) is not counted. PyTorch runs eagerly,
as the released code does.

On a CPU set XLA_FLAGS=--xla_cpu_enable_concurrency_optimized_scheduler=false: the
default schedule holds policy and reference activations at once, 23.4 GiB of temporaries
for one pair at 512 pixels in float32 where 8.8 do.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import types

CONTENDERS = ("ours", "torch cached", "torch online")
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
BETA, RANK = 5000.0, 4


def parse_arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description="Times the DPO train step against PyTorch's, in alternation.",
    epilog="example: python -m benchmarks.train_step --pairs 1 --dtype float32",
  )
  parser.add_argument("--pairs", type=int, default=1, help="pairs per step")
  parser.add_argument("--resolution", type=int, default=512, help="pixels")
  parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
  parser.add_argument("--remat", default="none", choices=["none", "full", "dots"])
  parser.add_argument("--attention", default="auto", choices=["auto", "xla", "cudnn"])
  parser.add_argument("--turns", type=int, default=2, help="turns of each contender")
  parser.add_argument("--steps", type=int, default=2, help="timed steps a turn")
  parser.add_argument("--only", choices=CONTENDERS, help=argparse.SUPPRESS)
  return parser.parse_args()


def time_steps(step, steps: int) -> list[float]:
  """Seconds of each step after the first; `step` returns when its loss is known."""
  step()
  seconds = []
  for _ in range(steps):
    start = time.perf_counter()
    step()
    seconds.append(time.perf_counter() - start)
  return seconds


def run_ours(options) -> dict:
  import jax
  import ml_dtypes  # noqa: F401, names bfloat16 to numpy
  import numpy as np
  import optax
  from jax.sharding import NamedSharding

  from safetydpo_jax import diffusion, lora, presets
  from safetydpo_jax.data.cache.batches import Batch
  from safetydpo_jax.formats.base_model.pipeline import parameter_shapes
  from safetydpo_jax.models import clip, published
  from safetydpo_jax.models.config import freeze
  from safetydpo_jax.models.unet import UNet2DCondition
  from safetydpo_jax.runtime import sharding
  from safetydpo_jax.training import optimizer
  from safetydpo_jax.training.config import make_config
  from safetydpo_jax.training.step import init_state, jit_train_step

  unet = UNet2DCondition(
    freeze(published.SD15_UNET),
    dtype=options.dtype,
    remat=options.remat,
    attention=options.attention,
  )
  text = clip.CLIPText(freeze(published.CLIP_L), dtype=options.dtype)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  replicated = NamedSharding(mesh, sharding.REPLICATED)
  shapes = {"unet": parameter_shapes(unet), "text_encoder": parameter_shapes(text)}

  rng = np.random.default_rng(0)

  def random_weights(leaf):
    weights = 0.02 * rng.standard_normal(leaf.shape, np.float32)
    return sharding.place(weights.astype(options.dtype), replicated)

  params = jax.tree.map(random_weights, shapes)
  preset = presets.get_config()
  preset.batch_size, preset.accumulation = options.pairs, 1
  config = make_config(preset.to_dict())
  tx = optimizer.make_optimizer(config)
  tree = lora.init_lora(jax.random.key(0), shapes["unet"], RANK, TARGETS)
  state = jax.device_put(init_state(tree, tx), replicated)
  pipeline = types.SimpleNamespace(
    unet=unet,
    text_encoders=(text,),
    schedule=diffusion.Schedule.from_config(
      {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    ),
    scaling_factor=0.18215,
  )
  shardings = sharding.base_shardings(mesh, shapes)
  train_step = jit_train_step(config, pipeline, mesh, tx, shardings)
  side = options.resolution // 8
  moments = rng.standard_normal((options.pairs, 2, side, side, 8)).astype(np.float16)
  token_ids = rng.integers(0, 49407, (options.pairs, 77)).astype(np.int32)
  batch = Batch(moments, (token_ids,))

  def step():
    nonlocal state
    state, metrics = train_step(state, params, sharding.place_batch(mesh, batch))
    return float(metrics["loss"])

  seconds = time_steps(step, options.steps)
  statistics_ = jax.devices()[0].memory_stats() or {}
  return {
    "seconds": seconds,
    "bytes": statistics_.get("peak_bytes_in_use"),
    "device": jax.devices()[0].device_kind,
    "versions": {"jax": jax.__version__, "optax": optax.__version__},
  }


def run_torch(options, online: bool) -> dict:
  import diffusers
  import peft
  import torch
  import torch.nn.functional as F
  import transformers
  from diffusers.training_utils import cast_training_params

  from safetydpo_jax.models import published

  device = "cuda" if torch.cuda.is_available() else "cpu"
  dtype = getattr(torch, options.dtype)
  torch.backends.cuda.matmul.allow_tf32 = True
  torch.set_default_dtype(dtype)  # weights are born in the dtype they are used in
  with torch.device(device):
    policy = diffusers.UNet2DConditionModel(**published.SD15_UNET)
    reference = diffusers.UNet2DConditionModel(**published.SD15_UNET)
    vae = diffusers.AutoencoderKL(**published.SD15_VAE) if online else None
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**published.CLIP_L))
  torch.set_default_dtype(torch.float32)
  for module in (policy, reference, text) + ((vae,) if online else ()):
    module.requires_grad_(False)
  policy.add_adapter(
    peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(TARGETS))
  )
  cast_training_params(policy, dtype=torch.float32)
  if options.remat != "none":
    policy.enable_gradient_checkpointing()
  weights = [p for p in policy.parameters() if p.requires_grad]
  adamw = torch.optim.AdamW(weights, lr=1.6e-4, weight_decay=1e-2)
  scheduler = diffusers.DDPMScheduler(
    beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
  )
  n, side = options.pairs, options.resolution // 8
  pixels = torch.randn(2 * n, 3, options.resolution, options.resolution, device=device)
  latents = torch.randn(2 * n, 4, side, side, device=device)
  token_ids = torch.randint(0, 49407, (n, 77), device=device)

  def errors(unet, noisy, timesteps, context, noise):
    out = unet(noisy.to(dtype), timesteps, encoder_hidden_states=context).sample
    return (out.float() - noise).square().mean(dim=(1, 2, 3))

  def step():
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
      with torch.no_grad():
        clean = latents
        if online:
          clean = vae.encode(pixels.to(dtype)).latent_dist.sample() * 0.18215
        context = text(token_ids).last_hidden_state.repeat(2, 1, 1)
        noise = torch.randn_like(clean[:n]).float().repeat(2, 1, 1, 1)
        timesteps = torch.randint(0, 1000, (n,), device=device).repeat(2)
        noisy = scheduler.add_noise(clean.float(), noise, timesteps)
        frozen = errors(reference, noisy, timesteps, context, noise)
      trained = errors(policy, noisy, timesteps, context, noise)
    gap = (trained[:n] - trained[n:]) - (frozen[:n] - frozen[n:])
    loss = -F.logsigmoid(-0.5 * BETA * gap).mean()
    adamw.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    adamw.step()
    return loss.item()

  seconds = time_steps(step, options.steps)
  return {
    "seconds": seconds,
    "bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    "versions": {
      name: importlib.metadata.version(name) for name in ("torch", "diffusers", "peft")
    },
  }


def run_one(options) -> None:
  """A turn of one contender; prints a JSON line."""
  if options.only == "ours":
    result = run_ours(options)
  else:
    result = run_torch(options, online=options.only == "torch online")
  if not result["bytes"]:  # no device counter: the process's own peak
    result["bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  print(json.dumps(result))


def main() -> None:
  options = parse_arguments()
  if options.only:
    run_one(options)
    return
  turns = {name: [] for name in CONTENDERS}
  for turn in range(options.turns):
    for name in CONTENDERS:
      print(f"turn {turn + 1} of {options.turns}: {name}", file=sys.stderr, flush=True)
      command = [sys.executable, "-m", "benchmarks.train_step", *sys.argv[1:]]
      output = subprocess.run(
        [*command, "--only", name], stdout=subprocess.PIPE, text=True, check=True
      ).stdout
      turns[name].append(json.loads(output.splitlines()[-1]))

  median = {
    name: statistics.median(s for result in results for s in result["seconds"])
    for name, results in turns.items()
  }
  device = turns["ours"][0]["device"]
  versions = {
    k: v for results in turns.values() for k, v in results[0]["versions"].items()
  }
  print(
    f"SD1.5 at {options.resolution} pixels, {options.pairs} pair(s) a step, "
    f"{options.dtype}, remat {options.remat}; {device} ({platform.machine()}, "
    f"{os.cpu_count()} cores), {datetime.date.today()}; "
    + ", ".join(f"{name} {version}" for name, version in versions.items())
  )
  print("\n| contender | s a step | pairs/s | ours is faster by | peak memory |")
  print("|---|---|---|---|---|")
  for name, results in turns.items():
    peak = max(result["bytes"] for result in results) / 2**30
    print(
      f"| {name} | {median[name]:.2f} | {options.pairs / median[name]:.3f} | "
      f"{median[name] / median['ours']:.2f}× | {peak:.1f} GiB |"
    )


if __name__ == "__main__":
  main()
