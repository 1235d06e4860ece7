"""Optimizers as the released SafetyDPO launchers set them, in optax.

AdamW stands behind a clip of the global gradient norm. Adafactor has a fixed rate, no
scaling by parameter size and its own clip of every update's RMS, as
`transformers.Adafactor(scale_parameter=False, relative_step=False)`: it factors every
matrix (optax would spare those thinner than 128, which is all of a LoRA), and weight
decay is multiplied by the learning rate.
"""

from typing import Any

import optax

from safetydpo_jax.errors import InputError


def effective_learning_rate(config: Any) -> float:
  """The rate after warm-up.

  With `scale_lr` it is `learning_rate` × pairs per optimizer step over all devices,
  which is the released code's lr × batch × accumulation × GPUs.
  """
  return config.learning_rate * (config.batch_size if config.scale_lr else 1)


def make_optimizer(config: Any) -> optax.GradientTransformation:
  """The optimizer of `config.optimizer`, 'adamw' or 'adafactor'.

  The rate grows linearly from 0 over `config.warmup_steps`, then stays; the first step
  with warm-up has rate 0, as with diffusers' constant_with_warmup.
  """
  rate = effective_learning_rate(config)
  if config.warmup_steps:
    rate = optax.linear_schedule(0.0, rate, config.warmup_steps)
  if config.optimizer == "adamw":
    return optax.chain(
      optax.clip_by_global_norm(config.clip_norm),
      optax.adamw(
        rate,
        b1=config.adam.b1,
        b2=config.adam.b2,
        eps=config.adam.eps,
        weight_decay=config.weight_decay,
      ),
    )
  if config.optimizer == "adafactor":
    return optax.chain(
      optax.scale_by_factored_rms(min_dim_size_to_factor=1),
      optax.clip_by_block_rms(1.0),
      optax.add_decayed_weights(config.weight_decay),
      optax.scale_by_learning_rate(rate),
    )
  raise InputError(
    f"optimizer is {config.optimizer!r}; expected 'adamw' or 'adafactor'"
  )
