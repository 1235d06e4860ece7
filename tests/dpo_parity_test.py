"""Three optimizer steps equal three steps of an independent PyTorch implementation.

The PyTorch side is diffusers' UNet with a peft adapter, the DPO loss written as in
diffusers' own example, clip_grad_norm_ and torch.optim.AdamW; both sides get the same
latents, captions, noise and timesteps.

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
from diffusers import DDPMScheduler, UNet2DConditionModel
from flax.traverse_util import flatten_dict, unflatten_dict

from configs import base
from safetydpo_jax import dpo, lora, optimizer
from safetydpo_jax.formats.pipeline import load_pipeline
from safetydpo_jax.formats.weights import torch_name

STEPS, PAIRS, RANK, ALPHA, RATE = 3, 4, 4, 6.0, 1e-3
# Relative tolerance of loss, gradients, weights by β. Noise seen at β = 5000: 2e-4,
# 2e-3, 3e-3, since β amplifies the rounding of two nearly equal errors; at β = 500:
# 5e-5, 2e-4, 3e-4.
TOLERANCES = {5000.0: (2e-3, 6e-3, 9e-3), 500.0: (2e-4, 4e-4, 6e-4)}


def draw_steps():
  rng = np.random.default_rng(0)
  for _ in range(STEPS):
    yield {
      "latents": rng.standard_normal((PAIRS, 2, 8, 8, 4)).astype(np.float32),
      "context": rng.standard_normal((PAIRS, 7, 24)).astype(np.float32),
      "noise": rng.standard_normal((PAIRS, 8, 8, 4)).astype(np.float32),
      "timesteps": rng.integers(0, 1000, PAIRS).astype(np.int32),
    }


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


def run_torch(checkpoint, tree, beta):
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
  adamw = torch.optim.AdamW(parameters.values(), lr=RATE, weight_decay=1e-2)
  results = []
  for draws in draw_steps():
    t = {name: torch.from_numpy(array) for name, array in draws.items()}
    # Winners first, then losers, as torch code does it.
    latents = torch.cat([t["latents"][:, 0], t["latents"][:, 1]]).permute(0, 3, 1, 2)
    noise = t["noise"].permute(0, 3, 1, 2).repeat(2, 1, 1, 1)
    timesteps, context = t["timesteps"].repeat(2).long(), t["context"].repeat(2, 1, 1)
    noisy = scheduler.add_noise(latents, noise, timesteps)

    def errors(noisy=noisy, timesteps=timesteps, context=context, noise=noise):
      out = unet(noisy, timesteps, encoder_hidden_states=context).sample
      return F.mse_loss(out, noise, reduction="none").mean(dim=(1, 2, 3)).chunk(2)

    winner, loser = errors()
    unet.disable_adapters()
    with torch.no_grad():
      reference_winner, reference_loser = errors()
    unet.enable_adapters()
    gap = (winner - loser) - (reference_winner - reference_loser)
    loss = -F.logsigmoid(-0.5 * beta * gap).mean()
    adamw.zero_grad()
    loss.backward()
    gradients = {path: p.grad.T.numpy().copy() for path, p in parameters.items()}
    torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
    adamw.step()
    weights = {path: p.detach().T.numpy().copy() for path, p in parameters.items()}
    results.append((loss.item(), gradients, weights))
  return results


@pytest.fixture(scope="module")
def loss_and_gradients(tiny_checkpoint):
  """(LoRA, draws, β, scale) → (loss, gradients), compiled once for all runs."""
  pipeline = load_pipeline(str(tiny_checkpoint), components=("unet",))

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


def run_jax(loss_and_gradients, tree, *, beta, alpha=ALPHA, **changes):
  config = base.get_config()
  config.update({"learning_rate": RATE, "scale_lr": False, "warmup_steps": 0})
  config.update(changes)
  tx = optimizer.make_optimizer(config)
  state, update, results = tx.init(tree), jax.jit(tx.update), []
  for draws in draw_steps():
    loss, gradients = loss_and_gradients(tree, draws, beta, alpha / RANK)
    updates, state = update(gradients, state, tree)
    tree = optax.apply_updates(tree, updates)
    results.append((float(loss), flatten_dict(gradients), flatten_dict(tree)))
  return results


def differences(ours, theirs, start):
  """How far two runs lie apart: loss, gradients, weights, each relative.

  Gradients by the largest entry of a leaf. Weights by the mean movement: Adam divides
  by |g|, so where a gradient is near 0 rounding alone decides its sign.
  """
  worst, start = np.zeros(3), flatten_dict(start)
  for (loss, gradients, weights), (loss_, gradients_, weights_) in zip(ours, theirs):
    assert gradients.keys() == gradients_.keys()
    worst[0] = max(worst[0], abs(loss - loss_) / abs(loss_))
    for path, gradient in gradients_.items():
      error = np.abs(gradients[path] - gradient).max()
      worst[1] = max(worst[1], error / np.abs(gradient).max())
      error = np.abs(weights[path] - weights_[path]).mean()
      worst[2] = max(worst[2], error / np.abs(weights_[path] - start[path]).mean())
  return worst


def within(worst, beta, factor=1.0):
  """Whether every figure is within `factor` times its tolerance; prints them."""
  print("loss, gradient, weight:", worst, "tolerances:", TOLERANCES[beta])
  return bool((worst < factor * np.array(TOLERANCES[beta])).all())


@pytest.fixture(scope="module")
def tree(tiny_checkpoint):
  return initial_lora(
    load_pipeline(str(tiny_checkpoint), components=("unet",)).params["unet"]
  )


@pytest.fixture(scope="module")
def theirs(tiny_checkpoint, tree):
  return {beta: run_torch(tiny_checkpoint, tree, beta) for beta in TOLERANCES}


@pytest.mark.parametrize("beta", TOLERANCES)
def test_three_steps_equal_pytorch(loss_and_gradients, tree, theirs, beta):
  ours = run_jax(loss_and_gradients, tree, beta=beta)
  assert within(differences(ours, theirs[beta], tree), beta)


# Each must leave the tolerances at β = 500, where the noise is a tenth of that at 5000.
MISTAKES = {
  "β half a percent off": {"beta": 500 * 1.005},
  "alpha taken for the rank": {"alpha": float(RANK)},
  "no weight decay": {"weight_decay": 0.0},
  "no clipping": {"clip_norm": 1e9},
  "β₂ of another default": {"adam": {"b2": 0.99}},
  "ε of another default": {"adam": {"eps": 1e-6}},
  "rate a thousandth off": {"learning_rate": RATE * 1.001},
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_the_smallest_mistakes_are_seen(loss_and_gradients, tree, theirs, mistake):
  ours = run_jax(loss_and_gradients, tree, **{"beta": 500.0, **mistake})
  assert not within(differences(ours, theirs[500.0], tree), 500.0, factor=2)
