"""The faithful preset: the hyperparameters of SafetyDPO's released launchers.

Every other config starts from here and changes the category. A variant after the colon
picks the model family: `--config configs/hate.py:sd15`. Any value can be overridden on
the command line: `--config.dpo.beta=2500`.

  python -m safetydpo_jax.train --config configs/hate.py --workdir runs/hate \
    --config.cache=CACHE

Expect a step loss near 0.69 for long while accuracy rises: at β = 5000 the mean hides
which pairs are learned. Winner and loser errors that both grow are divergence.
"""

from ml_collections import ConfigDict

# What differs between model families. Sources: the launchers released with SafetyDPO.
VARIANTS = {
  "sd15": {"model": "sd15"},
  # SD2.1 was released without a launcher, and its script refuses v-prediction: the
  # checkpoint says what it predicts, all numbers are SD1.5's. [inferred]
  "sd21": {"model": "sd21"},  # 768 pixels, v-prediction
  "sd21base": {"model": "sd21base"},  # 512 pixels, epsilon
  # 1024 pixels, sizes (1024, 1024, 0, 0, 1024, 1024).
  "sdxl": {
    "model": "sdxl",
    "optimizer": "adafactor",
    "scale_lr": False,  # 1e-5 as it stands
    "warmup_steps": 0,
    # Not the launcher's, and without influence on the result: 16 pairs one at a time.
    "accumulation": 16,
    "remat": "full",
  },
  # The toy world on a CPU: minutes instead of hours. A flip would move its symbols.
  "toy": {
    "model": "toy",
    "flip": "none",
    # The base draws no symbol unasked, with or without a caption: pairs under safe and
    # empty ones would only lower the likelihood of pictures it never makes, and with it
    # that of all others.
    "mixture": "unsafe",
    "caption_dropout": 0.0,
    "steps": 90,
    "batch_size": 16,
    "accumulation": 1,
    "learning_rate": 2.2e-3,
    "scale_lr": False,
    "warmup_steps": 10,
    # At a constant rate the last steps wander: one expert lost 11 points of utility.
    "schedule": "linear",
    # Clipping at 1 makes the first steps as small as the last, Adam divides by both
    # alike, and an expert that has learned all goes on moving.
    "clip_norm": 100.0,
    "checkpoint_every": 45,
    # The reference's two errors are 0.2 apart, and trading them is what is to be
    # learned: at β = 15 that is a margin of 3. At 250 a twelfth of the way satisfies
    # the loss, what little noise still hides drives the rest, and experts diverge.
    "dpo": {"beta": 15.0},
    # These see the text alone: what the symbols' words mean is unlearned, and pictures
    # without those words stay. All of attention lost twice the utility.
    "lora": {"targets": ("attn2.to_k", "attn2.to_v")},
    "dtype": "float32",
  },
}


def get_config(variant: str = "sd15", category: str = "all") -> ConfigDict:
  """The preset for one model family and category ('all' trains on every pair)."""
  if variant not in VARIANTS:
    raise ValueError(
      f"unknown variant {variant!r}; expected one of {', '.join(VARIANTS)}"
    )
  config = ConfigDict()
  config.model = ""  # diffusers directory, hub id or preset name
  config.variant = ""  # of the model's files: "fp16" where only those are there
  config.cache = ""  # what `encode` wrote
  config.category = category
  config.mixture = "both"  # captions: both | unsafe | safe. [inferred] both, 1:1
  config.holdout = 0.0  # share of the pairs kept out of training, chosen by their ids
  config.caption_dropout = 0.2  # share of captions replaced by ""
  config.flip = "independent"  # independent | shared | none; probability ½

  config.steps = 2000
  config.batch_size = 16  # pairs per optimizer step, over all devices
  config.accumulation = 4  # microbatches per optimizer step
  config.learning_rate = 1e-5
  config.scale_lr = True  # × batch_size: 1.6e-4 at 16 pairs
  config.warmup_steps = 500
  config.schedule = "constant"  # after the warm-up: constant | linear | cosine
  config.optimizer = "adamw"  # adamw | adafactor
  config.adam = ConfigDict({"b1": 0.9, "b2": 0.999, "eps": 1e-8})
  config.weight_decay = 1e-2
  config.clip_norm = 1.0  # of the global gradient; adamw only

  config.dpo = ConfigDict({"loss": "dpo", "beta": 5000.0})  # loss: dpo | sft
  config.lora = ConfigDict()
  config.lora.rank = 4
  config.lora.alpha = 4.0
  # Endings of PyTorch names: also ff.net.0.proj, ff.net.2, proj_in, conv1, conv_in, …
  config.lora.targets = ("to_q", "to_k", "to_v", "to_out.0")
  # Other values for single layers, the first that fits counts: (("conv1", 8),)
  config.lora.rank_pattern = ()
  config.lora.alpha_pattern = ()
  config.lora.dropout = 0.0  # of the policy's LoRA inputs, in training
  config.lora.init = ""  # a LoRA to start from, in any form `export` and `merge` read
  config.lora.seed = 0  # shared by all experts, so that factor-level merging works

  config.seed = 0
  config.log_every = 10
  config.checkpoint_every = 500
  config.resume = True

  config.mesh = ConfigDict({"data": -1, "fsdp": 1})  # −1: all devices fsdp leaves
  config.dtype = "bfloat16"  # compute and base weights; the LoRA stays float32
  config.remat = "none"  # none | full | dots
  config.attention = "auto"  # auto | xla | cudnn | splash
  config.update(VARIANTS[variant])
  return config
