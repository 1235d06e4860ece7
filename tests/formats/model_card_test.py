"""The model card says what there is to say, and whatever it says is only text."""

import json
import re
from dataclasses import fields
from typing import get_args

import pytest
import yaml

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats import model_card
from safetydpo_jax.formats.export_lora import ExportOptions

EXPORT = model_card.Export(
  kind="diffusers",
  file="pytorch_lora_weights.safetensors",
  base="sd15",
  fingerprint="0123456789abcdef",
  variant=None,
  about={
    "category": "hate",
    "targets": ["to_q", "to_out.0"],
    "step": 2000,
    "seed": 7,
    "dataset": "data1234",
    "config": {"dpo": {"beta": 5000}, "learning_rate": 1e-5, "batch_size": 16},
  },
  rank=4,
  parameters=797_184,
  dtype="float32",
  repository=None,
)
RATES = [
  {"folder": folder, "judge": judge, "category": category, "scope": scope}
  | {"n": 30, "rate": rate, "low": rate / 2, "high": rate * 1.5}
  for folder, judge, category, scope, rate in (
    ("reference", "ip", "all", "without_leaked", 0.4),
    ("images", "ip", "all", "without_leaked", 0.1),
    ("images", "ip", "all", "all", 0.77),
    ("images", "q16", "all", "without_leaked", 0.66),
  )
]
FIGURES = {
  "headline": "without_leaked",
  "rates": RATES,
  "scores": [
    {"score": "clip", "folder": "images", "category": "all", "n": 30, "mean": 26.5}
    | {"scope": "without_leaked"}
  ],
  "fid": [{"of": "images", "fid": 12.345}],
  "detectors": {"nudenet": {}, "q16": {}},
}


def card(tmp_path, content=None, **changes):
  figures = ""
  if content is not None:
    (tmp_path / "figures.json").write_text(json.dumps(content))
    figures = model_card.read_figures(tmp_path / "figures.json")
  export = EXPORT._replace(**changes)
  model_card.write_card(tmp_path / "README.md", export, figures)
  text = (tmp_path / "README.md").read_text()
  _, front, body = text.split("---\n", 2)
  # Cells are padded to the width of their column.
  body = re.sub(r"(?<=\|) +(?=\|)", "  ", body)
  return yaml.safe_load(front), re.sub(r"(?<=[^| ]) +\|", " |", body)


def test_every_format_of_export_has_a_card():
  (formats,) = [f.type for f in fields(ExportOptions) if f.name == "format"]
  assert set(get_args(formats)) == set(model_card.FORMS)


def test_it_says_base_data_method_licence_and_how_to_use_it(tmp_path):
  front, body = card(tmp_path)
  assert front["base_model"] == "sd-legacy/stable-diffusion-v1-5"
  assert front["base_model_relation"] == "adapter"
  assert front["license"] == "creativeml-openrail-m"
  assert front["library_name"] == "diffusers"
  assert "lora" in front["tags"]
  for row in ("β | 5000", "steps | 2000", "data fingerprint | data1234", "rank | 4"):
    assert f"| {row} |" in body
  assert "| layers | to\\_q, to\\_out.0 |" in body
  assert 'load_lora_weights(".", weight_name="pytorch_lora_weights.safetens' in body
  assert "does not rule them out" in body
  assert "arXiv 2412.10493" in body


@pytest.mark.parametrize("kind", ["diffusers", "kohya", "pipeline"])
def test_the_snippet_is_python(kind, tmp_path):
  _, body = card(tmp_path, kind=kind, repository='a/b"', variant="fp16")
  code = body.split("```python\n")[1].split("```")[0]
  compile(code, "snippet", "exec")
  assert 'variant="fp16"' in code
  assert ("<lora:pytorch_lora_weights:1>" in body) == (kind == "kohya")
  assert ("weights" in code) == (kind != "pipeline")


def test_a_merged_lora_lists_its_experts(tmp_path):
  experts = [{"category": "hate", "rank": 4, "step": 9, "seed": 1, "dataset": "d"}]
  about = {"category": "merged", "method": "co_merge_product", "experts": experts}
  _, body = card(tmp_path, about=about)
  assert "| hate | 4 | 9 | 1 | d |" in body
  assert "| method | co\\_merge\\_product |" in body


def test_figures_are_those_of_the_headline(tmp_path):
  _, body = card(tmp_path, FIGURES)
  assert "| all | 30 | 40.0 % (20.0 to 60.0) | 10.0 % (5.0 to 15.0) |" in body
  assert "| clip | images | 30 | 26.500 |" in body
  assert "| FID | images |  | 12.35 |" in body
  assert "judged by nudenet, q16" in body
  assert "77.0" not in body
  assert "66.0" not in body


def test_figures_without_a_base_or_an_interval_are_shown(tmp_path):
  row = RATES[1] | {"low": None, "high": None}
  _, body = card(tmp_path, FIGURES | {"rates": [row]})
  assert "| all | 30 |  | 10.0 % |" in body


@pytest.mark.parametrize(
  "figures", [[], {}, {"rates": [1]}, FIGURES | {"rates": [{"judge": "ip"}]}, "x"]
)
def test_a_file_that_holds_no_figures_is_named(figures, tmp_path):
  with pytest.raises(
    InputError, match=r"figures\.json is not a figures\.json of evaluate"
  ):
    card(tmp_path, figures)


EVIL = (
  "<script>alert(1)</script>\n# x\n---\n| [a](javascript:x) `c` ![i](http://e.x) \u202e"
)


def test_what_others_wrote_is_text_and_nothing_else(tmp_path):
  about = EXPORT.about | {
    "category": EVIL,
    "targets": [EVIL],
    "experts": [{"seed": EVIL}],
  }
  front, body = card(tmp_path, about=about, base=EVIL, repository=EVIL, variant=EVIL)
  prose, code, rest = body.partition("```python")
  code, _, rest = rest.partition("\n```\n")
  compile(code, "snippet", "exec")
  for text in (prose, rest):
    assert "<script" not in text
    assert "\n# x" not in text
    assert "[a]" not in text
    assert "http://e" not in text
    assert "\u202e" not in text
    assert "`c`" not in text
  assert set(front) == {"library_name", "pipeline_tag", "license", "tags"}


def test_a_folder_of_this_machine_is_not_disclosed(tiny_checkpoint, tmp_path):
  front, _ = card(tmp_path, base=str(tiny_checkpoint))
  text = (tmp_path / "README.md").read_text()
  assert str(tiny_checkpoint.parent) not in text
  assert f"PATH/TO/{tiny_checkpoint.name}" in text
  assert "base_model" not in front
  assert front["license"] == "other"
