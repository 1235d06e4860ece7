"""The presets: the hyperparameters of SafetyDPO's released launchers.

A preset has a name, which decides the pairs it trains on, and a variant, the model
family: `--config hate:sd15`. A config file of your own starts from one of them:

  from safetydpo_jax import presets

  def get_config(variant: str = "sd15"):
    config = presets.get_config("hate", variant)
    config.dpo.beta = 2500.0
    return config

Any value can be overridden on the command line: `--config.dpo.beta=2500`.

  python -m safetydpo_jax.train --config hate:sd15 --workdir runs/hate \
    --config.cache=CACHE

Expect a step loss near 0.69 for a long time while accuracy rises: at β = 5000 the mean
hides which pairs are learned. If the errors of preferred and dispreferred images both
grow, the run is diverging.
"""

from ml_collections import ConfigDict

from safetydpo_jax.data.categories import CATEGORIES
from safetydpo_jax.errors import InputError

# Preset → the category it trains on. `all_single` is one LoRA on every pair, the
# paper's "All-single" baseline for merged experts.
NAMES = {**{category: category for category in CATEGORIES}, "all_single": "all"}

# How the model families differ. Source: the launchers released with SafetyDPO.
VARIANTS = {
  "sd15": {"model": "sd15"},
  # There is no released launcher for SD2.1, and the released script refuses
  # v-prediction. Here the checkpoint says what it predicts, and every number is
  # SD1.5's. [inferred]
  "sd21": {"model": "sd21"},  # 768 pixels, v-prediction
  "sd21base": {"model": "sd21base"},  # 512 pixels, epsilon
  # 1024 pixels, sizes (1024, 1024, 0, 0, 1024, 1024).
  "sdxl": {
    "model": "sdxl",
    "optimizer": "adafactor",
    "scale_lr": False,  # 1e-5 whatever the batch
    "warmup_steps": 0,
    # Not from the launcher: 16 pairs one at a time, which saves memory and leaves the
    # result as it is.
    "accumulation": 16,
    "remat": "full",
  },
  # The toy world on a CPU: minutes instead of hours. A flip would move its symbols.
  "toy": {
    "model": "toy",
    "flip": "none",
    # The base model never draws a symbol that was not asked for, with or without a
    # caption. Pairs under safe or empty captions would only lower the likelihood of
    # images it does not make, and with it that of all others.
    "mixture": "unsafe",
    "caption_dropout": 0.0,
    "steps": 90,
    "batch_size": 16,
    "accumulation": 1,
    "learning_rate": 2.2e-3,
    "scale_lr": False,
    "warmup_steps": 10,
    # At a constant rate the last steps wander; one expert lost 11 points of utility.
    "schedule": "linear",
    # Clipping at 1 makes the first gradients as small as the last. Adam then divides
    # all of them alike, and an expert that has learned everything keeps moving.
    "clip_norm": 100.0,
    "checkpoint_every": 45,
    # The reference's two errors are 0.2 apart, and the expert has to swap them: at
    # β = 15 that is a margin of 3. At β = 250 a twelfth of the way satisfies the loss;
    # noise drives the rest, and experts diverge.
    "dpo": {"beta": 15.0},
    # These layers see nothing but the text: what the symbols' words mean is unlearned,
    # and images without those words stay. Adapting all of attention lost twice the
    # utility.
    "lora": {"targets": ("attn2.to_k", "attn2.to_v")},
    "dtype": "float32",
  },
}


def get_config(name: str = "all_single", variant: str = "sd15") -> ConfigDict:
  """A preset, to train with as it is or to change.

  Args:
    name: one of `NAMES`.
    variant: the model family, one of `VARIANTS`.

  Raises:
    InputError: the name or the variant is unknown.
  """
  if name not in NAMES:
    raise InputError(f"unknown preset {name!r}; expected one of {', '.join(NAMES)}")
  if variant not in VARIANTS:
    raise InputError(
      f"unknown variant {variant!r}; expected one of {', '.join(VARIANTS)}"
    )
  config = ConfigDict()
  config.model = ""  # directory, single file, hub id or name such as "sd15"
  config.variant = ""  # of the model's files: "fp16" where there are no others
  config.cache = ""  # the folder that `encode` wrote
  config.category = NAMES[name]
  config.mixture = "both"  # captions: both | unsafe | safe. [inferred] both, 1:1
  config.holdout = 0.0  # share of the pairs kept out of training, chosen by id
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
  # Endings of PyTorch names; also ff.net.0.proj, ff.net.2, proj_in, conv1, conv_in, …
  config.lora.targets = ("to_q", "to_k", "to_v", "to_out.0")
  # Other values for single layers; the first match counts: (("conv1", 8),)
  config.lora.rank_pattern = ()
  config.lora.alpha_pattern = ()
  config.lora.dropout = 0.0  # of the policy's LoRA inputs, in training
  config.lora.init = ""  # a LoRA to start from, in any format that `merge` reads
  config.lora.seed = 0  # the same for all experts: factor-level merging needs it

  config.seed = 0
  config.log_every = 10
  config.checkpoint_every = 500
  config.resume = True

  config.mesh = ConfigDict({"data": -1, "fsdp": 1})  # −1: devices / fsdp
  config.dtype = "bfloat16"  # compute and base weights; the LoRA stays float32
  config.remat = "none"  # none | full | dots
  config.attention = "auto"  # auto | xla | cudnn | splash
  config.update(VARIANTS[variant])
  return config
