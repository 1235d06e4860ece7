"""Optimizers as the released SafetyDPO launchers set them, in optax.

AdamW comes after a clip of the global gradient norm. Adafactor has a fixed rate, no
scaling by parameter size and its own clip of every update's RMS, like
`transformers.Adafactor(scale_parameter=False, relative_step=False)`: it factors every
matrix (optax would skip those thinner than 128, which is all of a LoRA), and weight
decay is multiplied by the learning rate.
"""

import optax

from safetydpo_jax.training.config import RunConfig

# After the warm-up: (rate, steps) → rate by step, for each of `config.SCHEDULES`.
AFTER_WARMUP = {
  "constant": lambda rate, steps: optax.constant_schedule(rate),
  "linear": lambda rate, steps: optax.linear_schedule(rate, 0.0, steps),
  "cosine": optax.cosine_decay_schedule,
}


def effective_learning_rate(config: RunConfig) -> float:
  """The rate after warm-up.

  With `scale_lr` it is `learning_rate` × pairs per optimizer step over all devices,
  which is the released code's lr × batch × accumulation × GPUs.
  """
  return config.learning_rate * (config.batch_size if config.scale_lr else 1)


def learning_rate_schedule(config: RunConfig) -> optax.Schedule:
  """The rate by step: up from 0 over `config.warmup_steps`, then `config.schedule`.

  "constant" stays there; "linear" and "cosine" fall to 0 at `config.steps`, as in
  diffusers' `get_scheduler`. With warm-up the rate of the first step is 0.
  """
  rate = effective_learning_rate(config)
  falling_steps = max(config.steps - config.warmup_steps, 1)
  after = AFTER_WARMUP[config.schedule](rate, falling_steps)
  warmup = optax.linear_schedule(0.0, rate, max(config.warmup_steps, 1))
  return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(config: RunConfig) -> optax.GradientTransformation:
  """AdamW or Adafactor, as `config.optimizer` says."""
  rate = learning_rate_schedule(config)
  if config.optimizer == "adafactor":
    return optax.chain(
      optax.scale_by_factored_rms(min_dim_size_to_factor=1),
      optax.clip_by_block_rms(1.0),
      optax.add_decayed_weights(config.weight_decay),
      optax.scale_by_learning_rate(rate),
    )
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
