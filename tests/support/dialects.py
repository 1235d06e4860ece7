"""LoRA files of every dialect on tiny UNets, and what their tools make of them.

`DIALECTS` has a row for each tool and kind of adapter. A file is drawn for a UNet; the
tool's own result is the UNet with the adapter merged in, by PEFT itself or by a twin of
the tool's published arithmetic, written apart from the package's. `measure` reads the
file with the package and compares weights.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import diffusers
import numpy as np
import peft
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from flax.core import freeze
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.torch import save_file

from safetydpo_jax.formats.base_model import weights
from safetydpo_jax.formats.base_model.pipeline import parameter_shapes
from safetydpo_jax.formats.loras import adapter as adapters
from safetydpo_jax.formats.loras import kohya as kohya_names
from safetydpo_jax.formats.loras import names
from safetydpo_jax.formats.loras.load import load_adapter
from safetydpo_jax.models.unet import UNet2DCondition
from tests.support import checkpoints, drawn, webuis
from tests.support.drawn import RANK
from tests.support.sizes import SIZES

_SD = checkpoints.UNET | {"layers_per_block": 2}
TINY = {
  "SD1": _SD,
  "SDXL": _SD | checkpoints.SDXL["unet"],
  # One resnet a level and no middle, which changes what sgm's numbers mean.
  "KOALA": checkpoints.UNET | checkpoints.SDXL["unet"] | {"mid_block_type": None},
}
LAYERS = torch.nn.Linear, torch.nn.Conv2d
NORMS = torch.nn.GroupNorm, torch.nn.LayerNorm


def make_unet(family: str) -> diffusers.UNet2DConditionModel:
  torch.manual_seed(0)
  return checkpoints.perturb(diffusers.UNet2DConditionModel(**TINY[family]))


# Names: a module of diffusers' UNet → what its tensors' names begin with.


def flat(module, config):
  return f"lora_unet_{module.replace('.', '_')}"


def flat_sgm(module, config):
  return f"lora_unet_{webuis.sgm_table(config)[module].replace('.', '_')}"


def kohya(module, config):
  """Its trainer holds SDXL as sgm does, SD1 and SD2 as diffusers does."""
  return (flat_sgm if "addition_embed_type" in config else flat)(module, config)


def lycoris(module, config):
  return f"lycoris_{module.replace('.', '_')}"


def omi(module, config):
  return f"unet.{webuis.sgm_table(config)[module]}"


def comfyui(module, config):
  return f"diffusion_model.{webuis.sgm_table(config)[module]}"


def dotted(module, config):
  return f"unet.{module}"


# Files, and the UNet that their tool makes of the base.


class Dialect(NamedTuple):
  """A tool and a kind of adapter.

  Attributes:
    tool, kind: for the table.
    write: (UNet, its config, folder) → the file or folder to load, and the UNet with
      it merged in.
    naming: how the file names modules.
    norms: whether norms are adapted too.
    by: what the tool's result was computed with.
  """

  tool: str
  kind: str
  write: Callable
  naming: Callable
  norms: bool = False
  by: str = "twin"


def modules_of(unet, norms=False):
  kinds = (*LAYERS, *NORMS) if norms else LAYERS
  return {name: m for name, m in unet.named_modules() if isinstance(m, kinds)}


def by_twin(naming, parts_of, norms=False, more=()):
  """A dialect's `write` for files whose tensors `parts_of` draws."""

  def write(unet, config, folder):
    state = {name: torch.ones(2) for name in more}
    with torch.no_grad():
      for name, module in modules_of(unet, norms).items():
        parts = parts_of(module.weight)
        if module.bias is None:
          parts.pop("diff_b", None)
        start = naming(name, config)
        state |= {f"{start}.{part}": t.contiguous() for part, t in parts.items()}
        bias = parts.pop("diff_b", parts.pop("b_norm", None))
        module.weight.copy_(drawn.merged(module.weight, parts))
        if bias is not None:
          module.bias += bias
    save_file(state, folder / "lora.safetensors")
    return folder / "lora.safetensors", unet

  return write


def by_peft(settings, where="peft"):
  """A dialect's `write` for adapters that PEFT made."""

  def write(unet, config, folder):
    targets = [*modules_of(unet)]
    options = {"target_modules": targets, "init_weights": False, **settings}
    kind = options.pop("kind", peft.LoraConfig)
    if kind is peft.LoraConfig:
      options["init_lora_weights"] = options.pop("init_weights")
    model = peft.get_peft_model(unet, kind(**options))
    with torch.no_grad():
      for name, parameter in model.named_parameters():
        if "magnitude" in name:
          parameter.copy_(parameter * (1 + 0.2 * torch.rand_like(parameter)))
        elif ".lora_" in name or ".lokr_" in name or ".hada_" in name:
          parameter.copy_(drawn.draw(*parameter.shape))
    model.save_pretrained(folder / "peft")
    if where == "diffusers":
      state = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(model))
      state = {name.removeprefix("base_model.model."): t for name, t in state.items()}
      about = {
        "r": RANK,
        "lora_alpha": options["lora_alpha"],
        "target_modules": targets,
      }
      about["use_dora"] = options.get("use_dora", False)
      diffusers.StableDiffusionPipeline.save_lora_weights(
        folder / "diffusers",
        unet_lora_layers=state,
        unet_lora_adapter_metadata=about,
      )
    return folder / where, model.merge_and_unload()

  return write


_LORA = {"r": RANK, "lora_alpha": 1.5}
_EXTRAS = {
  "OneTrainer": ("clip_l.x.alpha", "clip_g.x.lora_down.weight", "bundle_emb.y.clip_l"),
  "ComfyUI": ("text_encoders.clip_l.x.diff", "vae.x.diff"),
  "LyCORIS": ("lora_te1_x.hada_w1_a", "lora_te2_x.oft_blocks"),
}


def _twin(tool, kind, naming, parts_of, norms=False):
  more = _EXTRAS.get(tool, ())
  return Dialect(tool, kind, by_twin(naming, parts_of, norms, more), naming, norms)


DIALECTS = [
  Dialect("diffusers", "LoRA", by_peft(_LORA, "diffusers"), dotted, by="PEFT"),
  Dialect(
    "diffusers",
    "DoRA",
    by_peft({**_LORA, "use_dora": True}, "diffusers"),
    dotted,
    by="PEFT",
  ),
  Dialect("PEFT", "LoRA", by_peft(_LORA), dotted, by="PEFT"),
  Dialect("PEFT", "DoRA", by_peft({**_LORA, "use_dora": True}), dotted, by="PEFT"),
  Dialect(
    "PEFT",
    "LoHa",
    by_peft({"kind": peft.LoHaConfig, "r": RANK, "alpha": 2}),
    dotted,
    by="PEFT",
  ),
  Dialect(
    "PEFT",
    "LoKr",
    by_peft({"kind": peft.LoKrConfig, "r": RANK, "alpha": 2}),
    dotted,
    by="PEFT",
  ),
  Dialect(
    "PEFT",
    "LoKr with cores, whole where small",
    by_peft(
      {
        "kind": peft.LoKrConfig,
        "r": RANK,
        "alpha": 2,
        "decompose_both": True,
        "use_effective_conv2d": True,
        "rank_pattern": {"conv_out": 40, "time_emb_proj": 40},
      }
    ),
    dotted,
    by="PEFT",
  ),
  _twin("kohya", "LoRA, LoCon", kohya, drawn.draw_lora),
  _twin("kohya", "LoRA in float8", kohya, drawn.draw_float8),
  _twin("LyCORIS", "LoCon with a core", kohya, drawn.draw_tucker),
  _twin("LyCORIS", "LoHa", kohya, drawn.draw_loha),
  _twin("LyCORIS", "LoHa with cores", kohya, drawn.draw_loha_tucker),
  _twin("LyCORIS", "LoKr", kohya, drawn.draw_lokr),
  _twin("LyCORIS", "LoKr, both factored", kohya, drawn.draw_lokr_factored),
  _twin("LyCORIS", "LoKr, both whole", kohya, drawn.draw_lokr_whole),
  _twin("LyCORIS", "LoKr with a core", kohya, drawn.draw_lokr_tucker),
  _twin("LyCORIS", "DoRA", kohya, drawn.draw_dora),
  _twin("LyCORIS", "full, with norms", kohya, drawn.draw_full, norms=True),
  _twin("LyCORIS alone", "LoKr", lycoris, drawn.draw_lokr),
  _twin("OneTrainer", "LoRA (OMI)", omi, drawn.draw_lora),
  _twin("OneTrainer", "DoRA (OMI)", omi, drawn.draw_dora_in),
  _twin("OneTrainer", "LoRA (legacy)", flat, drawn.draw_lora),
  _twin("ComfyUI", "LoRA with differences", comfyui, drawn.draw_comfyui, norms=True),
]
# One for each naming that calls layers by their number.
NUMBERED = [
  next(dialect for dialect in DIALECTS if dialect.naming is naming)
  for naming in (kohya, omi, comfyui)
]


class Measured(NamedTuple):
  """Modules read, modules there, and the largest difference of a weight.

  The difference is relative to the largest change of a weight.
  """

  read: int
  there: int
  difference: float


def measure(dialect: Dialect, family: str, folder: Path) -> Measured:
  """Reads a dialect's file and compares the weights it gives with its tool's."""
  unet, config = make_unet(family), TINY[family]
  base = {name: tensor.numpy().copy() for name, tensor in unet.state_dict().items()}
  there = len(modules_of(unet, dialect.norms))
  torch.manual_seed(1)
  file, theirs = dialect.write(unet, config, folder)
  shapes = tree_shapes(family)
  params = weights.convert(base.items(), shapes)
  adapter, _ = load_adapter(str(file), config)
  adapters.check_shapes(params, adapter)
  ours = flatten_dict(with_adapter(params, adapter))
  wanted = flatten_dict(weights.convert(theirs_state(theirs), shapes))
  before = flatten_dict(params)
  worst = max(np.abs(np.asarray(ours[path]) - wanted[path]).max() for path in wanted)
  change = max(np.abs(before[path] - wanted[path]).max() for path in wanted)
  read = {path[:-1] for path in (*flatten_dict(adapter.lora), *adapter.rest)}
  return Measured(len(read), there, float(worst / change))


def with_adapter(params, adapter):
  """Weights with all of an adapter in them; without JAX, which compiles every shape."""
  found = flatten_dict(adapters.fold(params, adapter.rest))
  factors = flatten_dict(adapter.lora)
  for *path, part in factors:
    if part == "a":
      product = np.asarray(factors[*path, "a"]) @ np.asarray(factors[*path, "b"])
      kernel = found[*path, "kernel"]
      found[*path, "kernel"] = kernel + product.reshape(kernel.shape)
  return unflatten_dict(found)


def tree_shapes(family: str):
  """Our tree's shapes for a UNet of `TINY`."""
  return parameter_shapes(UNet2DCondition(freeze(TINY[family])))


def theirs_state(unet):
  return [(name, tensor.detach().numpy()) for name, tensor in unet.state_dict().items()]


@functools.cache
def published_modules(model: str, norms: bool) -> tuple[str, ...]:
  """The names of a UNet of `sizes.SIZES`, whose weights adapters change."""
  with torch.device("meta"):
    unet = diffusers.UNet2DConditionModel(**SIZES[model].unet)
  return tuple(modules_of(unet, norms))


def count_names(dialect: Dialect, model: str) -> tuple[int, int]:
  """Of a published model's modules, how many are read under the dialect's names."""
  config, modules = SIZES[model].unet, published_modules(model, dialect.norms)
  resnets = kohya_names.resnets_of(config)
  read = sum(
    names.parse(f"{dialect.naming(name, config)}.alpha", resnets)
    == (weights.tree_path(name), "alpha")
    for name in modules
  )
  return read, len(modules)
