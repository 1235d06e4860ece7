"""Which files hold a component's weights.

  <stem>[.<variant>].safetensors, or shards with an index
  <stem>.safetensors.index[.<variant>].json        also <stem>.<variant>.safetensors.in…

Pickles are never opened. A variant is taken where a component has it, as in diffusers:
the others are read without, and a variant that no component has is an error.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.tensors import NOT_READ, PICKLES
from safetydpo_jax.runtime import files
from safetydpo_jax.runtime.manifest import read_json

STEMS = ("diffusion_pytorch_model", "model")

_SHARD = r"-\d{5}-of-\d{5}"
_NAMES = re.compile(
  rf"({'|'.join(STEMS)})(\.(?P<variant>[^.]+?))?({_SHARD})?(\.(?P<old>[^.]+))?"
  r"\.safetensors"
)


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
  """The safetensors files of a component.

  Raises:
    InputError: there are none (of that variant), the index is not valid, or one was not
      fetched from Git LFS.
  """
  there = [path.name for path in folder.glob("*") if path.is_file()]
  for name in _candidates(variant):
    if name in there:
      found = _shards(folder / name) if name.endswith(".json") else [folder / name]
      for file in found:
        if files.is_lfs_pointer(file):
          raise InputError(f"{file} {files.NOT_FETCHED}")
      return found
  raise InputError(why_none(str(folder), there, variant))


def is_there(names: Collection[str], variant: str | None) -> bool:
  """Whether the names of a component's files include its weights, of that variant."""
  return any(name in names for name in _candidates(variant))


def choose_variants(
  components: Mapping[str, Collection[str]], variant: str | None, where: str
) -> dict[str, str | None]:
  """The variant to read of each component.

  Args:
    components: {component: the names of its files}.
    variant: what the user asks for, if anything.
    where: names the checkpoint in the error.

  Raises:
    InputError: no component has that variant.
  """
  chosen = {
    name: variant if is_there(names, variant) else None
    for name, names in components.items()
  }
  if variant and not any(chosen.values()):
    found = sorted({v for names in components.values() for v in _variants(names) if v})
    there = f"only {', '.join(found)}" if found else "and none of any other"
    raise InputError(
      f"{where} has no weights of variant {variant!r}, {there}; choose a variant that "
      "exists, or none"
    )
  return chosen


def _candidates(variant: str | None) -> list[str]:
  """The names that weights or their index may have, the first one first."""
  dot = f".{variant}" if variant else ""
  return [
    f"{stem}{ending}"
    for stem in STEMS
    for ending in (
      f"{dot}.safetensors",
      f".safetensors.index{dot}.json",
      f"{dot}.safetensors.index.json",
    )
  ]


def patterns(folder: str, variant: str | None) -> list[str]:
  """What to download of a component: one variant's safetensors, single or sharded."""
  dot = f".{variant}" if variant else ""
  shards = "-?????-of-?????"
  return [
    *(f"{folder}{name}" for name in _candidates(variant)),
    *(f"{folder}{stem}{dot}{shards}.safetensors" for stem in STEMS),
    *(f"{folder}{stem}{shards}{dot}.safetensors" for stem in STEMS),
  ]


def _shards(index: Path) -> list[Path]:
  """The files an index names, which must be in its folder."""
  table = read_json(index, "weight index")
  names = table.get("weight_map") if isinstance(table, dict) else None
  if not isinstance(names, dict) or not names:
    raise InputError(
      f"{index} is not a weight index: it has no 'weight_map'; fetch it again"
    )
  found = sorted({str(name) for name in names.values()})
  for name in found:
    if Path(name).name != name or name in ("", ".", ".."):
      raise InputError(f"{index} names {name!r}, which is not a file in its folder")
    if not (index.parent / name).is_file():
      raise InputError(f"{index} names {name}, which does not exist; fetch it again")
  return [index.parent / name for name in found]


def _variants(names: Collection[str]) -> set[str | None]:
  """The variants whose safetensors are there; None stands for those without."""
  matches = filter(None, map(_NAMES.fullmatch, names))
  return {match["variant"] or match["old"] for match in matches}


def why_none(where: str, names: Collection[str], variant: str | None) -> str:
  """The message for a component without matching safetensors.

  Args:
    where: the component's folder, or its name on the hub.
    names: of the files there.
    variant: that was asked for.
  """
  there = sorted(names)
  if found := [name for name in there if name.endswith(".safetensors")]:
    wanted = f"of variant {variant!r}" if variant else "without a variant"
    others = sorted(v for v in _variants(names) - {variant} if v)
    way = "choose a variant that exists"
    if others and not variant:
      way = f"ask for variant {others[0]!r}, as in --variant {others[0]}"
    elif variant in _variants(names) or not (others or None in _variants(names)):
      way = f"expected {' or '.join(_candidates(variant)[::3])}, or their index"
    return f"{where} has no weights {wanted}, only {', '.join(found)}; {way}"
  if pickles := [name for name in there if name.endswith(PICKLES)]:
    return f"{where} has only {', '.join(pickles)}: {CONVERT}"
  if any(name.endswith(".msgpack") for name in there):
    return f"{where} has weights of Flax only; give the PyTorch checkpoint"
  expected = " or ".join(f"{stem}.safetensors" for stem in STEMS)
  return f"{where} has no weights: expected {expected}"


CONVERT = (
  f"{NOT_READ}; convert the checkpoint once with diffusers: "
  "DiffusionPipeline.from_pretrained(...).save_pretrained(NEW_FOLDER)"
)
