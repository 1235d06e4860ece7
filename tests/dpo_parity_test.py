"""Three optimizer steps equal three steps of an independent PyTorch implementation.

The PyTorch side is diffusers' UNet with a peft adapter, the DPO loss written as in
diffusers' own example, clip_grad_norm_ and torch.optim.AdamW; both sides get the same
latents, captions, noise and timesteps. So for each family: SD1 (epsilon), SD2 with
v-prediction, and SDXL with its pooled text and sizes under its preset's Adafactor,
which is transformers'.

Tolerances lie between the noise seen (float32, two frameworks) and the smallest
mistakes we could think of: `MISTAKES`, each of which must break them twice over.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from diffusers import DDPMScheduler, UNet2DConditionModel
from flax.traverse_util import flatten_dict, unflatten_dict

from safetydpo_jax import dpo, lora
from safetydpo_jax.formats.base_model.pipeline import load_pipeline
from safetydpo_jax.formats.base_model.weights import torch_name
from safetydpo_jax.training import optimizer
from tests.support.checkpoints import (
  SD2,
  save_tiny_checkpoint,
  save_tiny_sdxl_checkpoint,
)
from tests.support.configs import run_config

# The rate decides how far an entry whose sign is rounding's (`differences`) moves the
# next step's margin, times β: at 1e-3 that was seen to be a tenth of it.
STEPS, PAIRS, RANK, ALPHA, RATE = 3, 4, 4, 6.0, 1e-4
# Relative tolerance of loss, gradients, weights by β. Noise seen at β = 5000: 3e-4,
# 1e-3, 3e-4, since β amplifies the rounding of two nearly equal errors; at β = 500:
# 5e-5, 1e-4, 2e-4.
TOLERANCES = {5000.0: (2e-3, 6e-3, 9e-3), 500.0: (2e-4, 4e-4, 4e-4)}


# How a tiny checkpoint of a family is made, and what its config sets otherwise. The
# seeds are of weights whose gradients are large enough to compare: with others rounding
# alone was seen to move a gradient of the SD2 network by 3e-2 at β = 5000.
FAMILIES = {
  "sd1": (save_tiny_checkpoint, {}),
  "sd2": (lambda path: save_tiny_checkpoint(path, seed=3, **SD2), {}),
  "sdxl": (
    lambda path: save_tiny_sdxl_checkpoint(path, seed=1),
    {"optimizer": "adafactor"},
  ),
}


def draw_steps(family):
  rng = np.random.default_rng(0)
  for _ in range(STEPS):
    draws = {
      "latents": rng.standard_normal((PAIRS, 2, 8, 8, 4)).astype(np.float32),
      "context": rng.standard_normal((PAIRS, 7, 24)).astype(np.float32),
      "noise": rng.standard_normal((PAIRS, 8, 8, 4)).astype(np.float32),
      "timesteps": rng.integers(0, 1000, PAIRS).astype(np.int32),
    }
    if family == "sdxl":
      draws["context"] = rng.standard_normal((PAIRS, 7, 40)).astype(np.float32)
      draws["added_cond"] = {
        "text_embeds": rng.standard_normal((PAIRS, 10)).astype(np.float32),
        "time_ids": rng.integers(0, 1024, (PAIRS, 6)).astype(np.int32),
      }
    yield draws


def initial_lora(unet_params):
  """b is small but not 0: with b = 0 the first gradient of every a would be 0."""
  tree = flatten_dict(lora.init_lora(jax.random.key(0), unet_params, RANK))
  rng = np.random.default_rng(1)
  return unflatten_dict(
    {
      path: jnp.asarray(rng.standard_normal(leaf.shape) * 1e-3, jnp.float32)
      if path[-1] == "b"
      else leaf
      for path, leaf in tree.items()
    }
  )


def run_torch(family, checkpoint, tree, beta):
  """Losses, gradients and weights after each step, named by tree path."""
  unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet").eval()
  unet.requires_grad_(False)
  unet.add_adapter(
    peft.LoraConfig(
      r=RANK, lora_alpha=ALPHA, target_modules=list(lora.ATTENTION_TARGETS)
    )
  )
  modules = dict(unet.named_modules())
  parameters = {}
  for path, leaf in flatten_dict(tree).items():
    side = {"a": "lora_A", "b": "lora_B"}[path[-1]]
    weight = modules[f"{torch_name(path[:-1])}.{side}.default"].weight
    weight.data = torch.from_numpy(np.array(leaf).T.copy())
    parameters[path] = weight
  trainable = {id(p) for p in unet.parameters() if p.requires_grad}
  assert trainable == {id(p) for p in parameters.values()}

  scheduler = DDPMScheduler.from_pretrained(checkpoint / "scheduler")
  if family == "sdxl":
    tx = transformers.optimization.Adafactor(
      parameters.values(),
      lr=RATE,
      scale_parameter=False,
      relative_step=False,
      weight_decay=1e-2,
    )
  else:
    tx = torch.optim.AdamW(parameters.values(), lr=RATE, weight_decay=1e-2)
  results = []
  for draws in draw_steps(family):
    added = {
      name: torch.from_numpy(array).repeat(2, 1)
      for name, array in draws.pop("added_cond", {}).items()
    }
    t = {name: torch.from_numpy(array) for name, array in draws.items()}
    # Winners first, then losers, as torch code does it.
    latents = torch.cat([t["latents"][:, 0], t["latents"][:, 1]]).permute(0, 3, 1, 2)
    noise = t["noise"].permute(0, 3, 1, 2).repeat(2, 1, 1, 1)
    timesteps, context = t["timesteps"].repeat(2).long(), t["context"].repeat(2, 1, 1)
    inputs = {"sample": scheduler.add_noise(latents, noise, timesteps)}
    inputs |= {"timestep": timesteps, "encoder_hidden_states": context}
    target = noise
    if family == "sd2":
      target = scheduler.get_velocity(latents, noise, timesteps)

    def errors(inputs=inputs, added=added, target=target):
      out = unet(**inputs, added_cond_kwargs=added).sample
      return F.mse_loss(out, target, reduction="none").mean(dim=(1, 2, 3)).chunk(2)

    winner, loser = errors()
    unet.disable_adapters()
    with torch.no_grad():
      reference_winner, reference_loser = errors()
    unet.enable_adapters()
    gap = (winner - loser) - (reference_winner - reference_loser)
    loss = -F.logsigmoid(-0.5 * beta * gap).mean()
    tx.zero_grad()
    loss.backward()
    gradients = {path: p.grad.T.numpy().copy() for path, p in parameters.items()}
    if family != "sdxl":  # Adafactor clips its own updates
      torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
    tx.step()
    weights = {path: p.detach().T.numpy().copy() for path, p in parameters.items()}
    results.append((loss.item(), gradients, weights))
  return results


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
  return request.param


@pytest.fixture(scope="module")
def checkpoint(family, tmp_path_factory):
  return FAMILIES[family][0](tmp_path_factory.mktemp(family) / "checkpoint")


@pytest.fixture(scope="module")
def loss_and_gradients(checkpoint):
  """(LoRA, draws, β, alpha) → (loss, gradients), compiled once for all runs."""
  pipeline = load_pipeline(str(checkpoint), components=("unet",))

  def loss(tree, draws, beta, scale):
    return dpo.dpo_loss(
      lora.scale(tree, scale),
      pipeline.params["unet"],
      **draws,
      unet=pipeline.unet,
      schedule=pipeline.schedule,
      beta=beta,
    )[0]

  return jax.jit(jax.value_and_grad(loss))


def run_jax(
  family, loss_and_gradients, tree, *, beta, alpha=ALPHA, edit=dict, **changes
):
  settings = {"learning_rate": RATE, "scale_lr": False, "warmup_steps": 0}
  config = run_config(**{**settings, **FAMILIES[family][1], **changes})
  tx = optimizer.make_optimizer(config)
  state, update, results = tx.init(tree), jax.jit(tx.update), []
  for draws in map(edit, draw_steps(family)):
    loss, gradients = loss_and_gradients(tree, draws, beta, alpha / RANK)
    updates, state = update(gradients, state, tree)
    tree = optax.apply_updates(tree, updates)
    results.append((float(loss), flatten_dict(gradients), flatten_dict(tree)))
  return results


def differences(ours, theirs, start):
  """How far two runs lie apart: loss, gradients, weights, each relative.

  Gradients by the largest entry of a leaf. Weights by the mean movement, over entries
  whose gradients were never below a hundredth of the leaf's largest, some 95 %: Adam
  divides by |g|, so where it is near 0 rounding alone decides the sign, and one such
  entry in a leaf of a hundred is a thousandth of the leaf's movement.
  """
  worst, start = np.zeros(3), flatten_dict(start)
  clear = {path: np.ones(leaf.shape, bool) for path, leaf in start.items()}
  for (loss, gradients, weights), (loss_, gradients_, weights_) in zip(ours, theirs):
    assert gradients.keys() == gradients_.keys()
    worst[0] = max(worst[0], abs(loss - loss_) / abs(loss_))
    for path, gradient in gradients_.items():
      error = np.abs(gradients[path] - gradient).max()
      worst[1] = max(worst[1], error / np.abs(gradient).max())
      clear[path] &= np.abs(gradient) > 1e-2 * np.abs(gradient).max()
      assert clear[path].mean() > 0.8
      error = np.abs(weights[path] - weights_[path])[clear[path]].mean()
      worst[2] = max(worst[2], error / np.abs(weights_[path] - start[path]).mean())
  return worst


def within(worst, beta, factor=1.0):
  """Whether every figure is within `factor` times its tolerance; prints them."""
  print("loss, gradient, weight:", worst, "tolerances:", TOLERANCES[beta])
  return bool((worst < factor * np.array(TOLERANCES[beta])).all())


@pytest.fixture(scope="module")
def tree(checkpoint):
  return initial_lora(
    load_pipeline(str(checkpoint), components=("unet",)).params["unet"]
  )


@pytest.fixture(scope="module")
def theirs(family, checkpoint, tree):
  return {beta: run_torch(family, checkpoint, tree, beta) for beta in TOLERANCES}


@pytest.mark.parametrize("beta", TOLERANCES)
def test_three_steps_equal_pytorch(family, loss_and_gradients, tree, theirs, beta):
  ours = run_jax(family, loss_and_gradients, tree, beta=beta)
  assert within(differences(ours, theirs[beta], tree), beta)


def swap_sizes(draws):
  """Height for width in the time ids."""
  added = draws["added_cond"]
  ids = added["time_ids"][:, [1, 0, 3, 2, 5, 4]]
  return {**draws, "added_cond": {**added, "time_ids": ids}}


def swap_pooled(draws):
  """The pooled text of another pair."""
  added = draws["added_cond"]
  pooled = np.roll(added["text_embeds"], 1, axis=0)
  return {**draws, "added_cond": {**added, "text_embeds": pooled}}


# Each must leave the tolerances at β = 500, where the noise is a tenth of that at 5000.
MISTAKES = {
  "sd1": {
    "β half a percent off": {"beta": 500 * 1.005},
    "alpha taken for the rank": {"alpha": float(RANK)},
    "no weight decay": {"weight_decay": 0.0},
    "no clipping": {"clip_norm": 1e9},
    "β₂ of another default": {"adam.b2": 0.99},
    "ε of another default": {"adam.eps": 1e-6},
    "rate a thousandth off": {"learning_rate": RATE * 1.001},
  },
  "sd2": {"β half a percent off": {"beta": 500 * 1.005}},
  "sdxl": {
    "no weight decay": {"weight_decay": 0.0},
    "rate a thousandth off": {"learning_rate": RATE * 1.001},
    "the other optimizer": {"optimizer": "adamw"},
    "height for width": {"edit": swap_sizes},
    "the pooled text of another pair": {"edit": swap_pooled},
  },
}


def test_the_smallest_mistakes_are_seen(family, loss_and_gradients, tree, theirs):
  for name, mistake in MISTAKES[family].items():
    ours = run_jax(family, loss_and_gradients, tree, **{"beta": 500.0, **mistake})
    print(name)
    assert not within(differences(ours, theirs[500.0], tree), 500.0, factor=2), name
