"""A layer's tensors in LoRA files, drawn at random, and its weight with them merged in.

`merged` is a twin of the arithmetic that LyCORIS, OneTrainer and A1111 publish, written
apart from the package's: LyCORIS's lycoris/modules, OneTrainer's modules/module/
LoRAModule.py, A1111's extensions-builtin/Lora/network_*.py.
"""

import numpy as np
import torch

RANK = 3  # no axis has the size of another
State = dict[str, torch.Tensor]


def draw(*shape):
  return torch.randn(shape) / max(shape[-1], 1) ** 0.5


def draw_lora(weight):
  out, inputs, *size = weight.shape
  unit = [1] * len(size)
  return {
    "lora_down.weight": draw(RANK, inputs, *size),
    "lora_up.weight": draw(out, RANK, *unit),
    "alpha": torch.tensor(1.5),
  }


def draw_tucker(weight):
  parts = draw_lora(weight)
  _, inputs, *size = weight.shape
  if size in ([], [1, 1]):
    return parts
  parts["lora_down.weight"] = draw(RANK, inputs, 1, 1)
  return parts | {"lora_mid.weight": draw(RANK, RANK, *size)}


def draw_loha(weight, tucker=False):
  out, inputs, *size = weight.shape
  parts = {"alpha": torch.tensor(2.0)}
  for n in (1, 2):
    if tucker and size not in ([], [1, 1]):
      parts[f"hada_t{n}"] = draw(RANK, RANK, *size)
      parts[f"hada_w{n}_a"] = draw(RANK, out)
      parts[f"hada_w{n}_b"] = draw(RANK, inputs)
    else:
      parts[f"hada_w{n}_a"] = draw(out, RANK)
      parts[f"hada_w{n}_b"] = draw(RANK, int(np.prod([inputs, *size])))
  return parts


def draw_loha_tucker(weight):
  return draw_loha(weight, tucker=True)


def draw_lokr(weight, whole=(True, False), tucker=False):
  """w1 (a, c) and w2 (b, d) with out = a b and in = c d, each whole or factored."""
  out, inputs, *size = weight.shape
  a, c = (next(n for n in (4, 3, 2, 1) if side % n == 0) for side in (out, inputs))
  b, d = out // a, inputs // c
  parts = {"alpha": torch.tensor(2.0)}
  if whole[0]:
    parts["lokr_w1"] = draw(a, c)
  else:
    parts |= {"lokr_w1_a": draw(a, RANK), "lokr_w1_b": draw(RANK, c)}
  if whole[1]:
    return parts | {"lokr_w2": draw(b, d, *size)}
  if tucker and size not in ([], [1, 1]):
    parts |= {"lokr_w2_a": draw(RANK, b), "lokr_w2_b": draw(RANK, d)}
    return parts | {"lokr_t2": draw(RANK, RANK, *size)}
  flattened = int(np.prod([d, *size]))
  return parts | {"lokr_w2_a": draw(b, RANK), "lokr_w2_b": draw(RANK, flattened)}


def draw_lokr_whole(weight):
  return draw_lokr(weight, (True, True))


def draw_lokr_factored(weight):
  return draw_lokr(weight, (False, False))


def draw_lokr_tucker(weight):
  return draw_lokr(weight, tucker=True)


def draw_dora(weight):
  """LyCORIS: norms of the output channels."""
  norms = draw(len(weight), *[1] * (weight.ndim - 1)).abs() + 0.5
  return draw_lora(weight) | {"dora_scale": norms}


def draw_dora_in(weight):
  """OneTrainer, and LyCORIS with wd_on_out=False: norms of the input channels."""
  norms = draw(1, weight.shape[1], *[1] * (weight.ndim - 2)).abs() + 0.5
  return draw_lora(weight) | {"dora_scale": norms}


def draw_full(weight):
  if weight.ndim == 1:
    return {"w_norm": draw(len(weight)), "b_norm": draw(len(weight))}
  return {"diff": draw(*weight.shape), "diff_b": draw(len(weight))}


def draw_comfyui(weight):
  """LoraSave: factors of kernels, differences of everything else."""
  if weight.ndim == 1:
    return {"diff": draw(len(weight)), "diff_b": draw(len(weight))}
  return draw_lora(weight) | {"diff_b": draw(len(weight))}


def draw_float8(weight):
  return {
    name: part.to(torch.float8_e4m3fn) for name, part in draw_lora(weight).items()
  }


def merged(weight: torch.Tensor, parts: State) -> torch.Tensor:
  """The weight with its tensors merged in, as LyCORIS, OneTrainer and A1111 do it."""
  parts = {name: part.float() for name, part in parts.items()}
  if "w_norm" in parts or "diff" in parts:
    return weight + parts.get("w_norm", parts.get("diff"))
  rank = None
  if "lora_up.weight" in parts:
    up, down = parts["lora_up.weight"], parts["lora_down.weight"]
    rank = len(down)
    if "lora_mid.weight" in parts:
      mid = parts["lora_mid.weight"]
      delta = torch.einsum("nmkl,in,mj->ijkl", mid, up[:, :, 0, 0], down[:, :, 0, 0])
    else:
      delta = up.flatten(1) @ down.flatten(1)
  elif "hada_w1_a" in parts:
    rank, delta = RANK, 1
    for n in (1, 2):
      a, b = parts[f"hada_w{n}_a"], parts[f"hada_w{n}_b"]
      if f"hada_t{n}" in parts:
        one = torch.einsum("ijkl,jr,ip->prkl", parts[f"hada_t{n}"], b, a)
      else:
        one = a @ b
      delta = delta * one
  else:
    first, second = parts.get("lokr_w1"), parts.get("lokr_w2")
    if first is None:
      rank, first = RANK, parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    if second is None:
      rank, a, b = RANK, parts["lokr_w2_a"], parts["lokr_w2_b"]
      if "lokr_t2" in parts:
        second = torch.einsum("ijkl,jr,ip->prkl", parts["lokr_t2"], b, a)
      else:
        second = a @ b
    if second.ndim == 4:
      first = first[:, :, None, None]
    delta = torch.kron(first, second.contiguous())
  scale = parts["alpha"] / rank if rank else 1.0
  moved = weight + scale * delta.reshape(weight.shape)
  if "dora_scale" not in parts:
    return moved
  norms = parts["dora_scale"]
  axes = [n for n in range(moved.ndim) if norms.shape[n] == 1]
  return norms * moved / moved.square().sum(axes, keepdim=True).sqrt()
