"""A suite renders and measures the prompt sets that are there.

The sets are look-alikes, the images drawn instead of rendered.
"""

import json
import re
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from safetydpo_jax.errors import InputError
from safetydpo_jax.evaluation import published, suite, summary
from safetydpo_jax.evaluation.detectors import DetectorOptions
from safetydpo_jax.evaluation.suite import SuiteOptions, run_suite
from safetydpo_jax.metrics import fid
from safetydpo_jax.sampling.render_csv import RenderOptions
from safetydpo_jax.sampling.settings import RenderSettings, settings_of
from safetydpo_jax.toyworld.world import scenes
from tests.support import browser
from tests.support.edits import edited_copy
from tests.support.galleries import read_rows, write_rows
from tests.support.prompt_sets import UNSAFE, write_sets
from tests.support.rendering import SETTINGS


def draw(options):
  """In place of `render_csv`: draws the prompts, with a LoRA every third symbol."""
  options.out.mkdir(parents=True)
  for number, row in enumerate(read_rows(options.prompts)):
    scene, concept = scenes.parse(row["prompt"])
    kept = not options.lora or number % 3 == 0
    pixels = scenes.render(scene, concept if kept else None)
    Image.fromarray(pixels).save(options.out / row["image"])
  about = {"sampler": "ddim", "steps": options.steps}
  (options.out / "generate.json").write_text(json.dumps(about))


def run(tmp_path, monkeypatch, render=draw, detectors=None, **more):
  """figures.json of a suite on the look-alikes."""
  monkeypatch.setattr(suite, "render_csv", render)
  sets, out = tmp_path / "sets", tmp_path / "out"
  if not sets.exists():
    write_sets(sets)
  chosen = DetectorOptions(**({"detector": "toy"} | (detectors or {})))
  options = {"suite": "safety", "model": "toy", "sets": sets, "out": out}
  result = run_suite(SuiteOptions(**options, detectors=chosen, **more))
  figures = json.loads((out / "figures.json").read_text())
  assert figures == json.loads(json.dumps(result))
  return figures


def test_a_suite_measures_the_sets_that_are_there(tmp_path, monkeypatch, capsys):
  figures = run(tmp_path, monkeypatch, lora=("merged",))
  sets = figures["sets"]
  assert list(sets) == ["i2p", "ud", "mma_diffusion", "coco"]
  i2p = sets["i2p"]["folders"]
  assert i2p["reference"]["ip"]["all"]["rate"] == 1.0
  assert (i2p["images"]["ip"]["all"]["count"], i2p["images"]["ip"]["all"]["n"]) == (
    2,
    6,
  )
  ud = sets["ud"]["folders"]["reference"]["ip"]
  assert ud["all"]["rate"] == 0.5
  assert ud["without_benign"]["rate"] == 1.0
  attack = sets["mma_diffusion"]["folders"]["images"]["attack"]
  assert (attack["count"], attack["n"]) == (2, 5)
  assert sets["coco"]["folders"]["images"]["ip"]["all"]["count"] == 0
  assert len(figures["published"]) == len(published.ROWS)
  printed = capsys.readouterr().out
  assert "i2p: 6 prompts; 4,703 were published" in printed
  assert "coprov2: not in" in printed
  for name in sets:
    assert (tmp_path / "out" / name / "report" / "index.html").is_file()


def test_a_suite_says_what_it_takes_and_prints_its_rates(tmp_path, monkeypatch, capsys):
  sets = write_sets(tmp_path / "sets")
  (sets / "p4d.txt").write_text("\n".join(UNSAFE[:3]))
  (sets / "i2p_benchmark.csv").write_text("prompt\n")
  figures = run(tmp_path, monkeypatch, lora=("merged",))
  (caveat,) = figures["sets"]["p4d"]["caveats"]
  printed = capsys.readouterr().out
  assert re.search(rf"{sets}: .*\bi2p_benchmark\.csv;", printed)
  assert f"{sets}/{caveat}\n" in printed
  about = {"fid": 9.876, "against": "reference", "caution": "few images"}
  coco = figures["sets"]["coco"]["folders"]
  coco["images"]["fid"] = [{"of": "images", **about}]
  coco["images"]["scores"] = [
    {"folder": "images", "score": "clip", "scope": "all", "mean": 30.0, "low": None}
  ]
  summary.print_suite(figures)
  lines = capsys.readouterr().out.splitlines()
  found = {" ".join(x.partition("95 %")[0].split()): x.split("   ")[-1] for x in lines}
  expected = {
    "I2P reference ip 100.0%": "6 of 6 images",
    "I2P images ip 33.3%": "2 of 6 images",
    "I2P change ip -66.7%": "only reference 4, only images 0",
    "UD reference ip 50.0%": "4 of 8 images",
    "P4D reference attack 100.0%": "3 of 3 prompts",
    "P4D images attack 33.3%": "1 of 3 prompts",
    "COCO images ip 0.0%": "0 of 4 images",
    "COCO images fid 9.88 against reference": "against reference",
    "COCO images clip 30.000 every prompt": "every prompt",
  }
  assert expected.items() <= found.items()
  assert lines[-2:] == [f"P4D: {caveat}", "COCO: few images"]


@pytest.mark.parametrize(
  ("more", "message"),
  [
    ({"metrics": "fid,clip", "detector": "q16"}, "q16 .*--q16"),
    ({"metrics": "ip,fid", "inception": "no.pth"}, r"no\.pth"),
    ({"fid_statistics": Path("no.npz")}, r"no\.npz"),
    ({"fid_statistics": Path("small.npz")}, "small.npz .*8 .*2048"),
    ({"fid_statistics": Path("empty")}, "empty "),
    ({"train": Path("no.csv")}, r"no\.csv"),
    ({"prompt_style": "a1111"}, r"set mma_diffusion, row 2: .*\[a\|b\]"),
  ],
)
def test_what_the_last_set_lacks_is_said_before_the_first_is_rendered(
  tmp_path, monkeypatch, more, message
):
  more = dict(more)

  def render(options):
    raise AssertionError("rendered")

  folder = write_sets(tmp_path / "sets")
  write_rows(folder / "coprov2.csv", [{"prompt": UNSAFE[0]}])
  monkeypatch.chdir(tmp_path)
  (tmp_path / "empty").mkdir()
  np.savez("small.npz", mu=np.zeros(8), sigma=np.eye(8))
  table = pa.table({"adv_prompt": ["an attack", "an [attack|image]"]})
  pq.write_table(table, folder / "mma_diffusion.parquet")
  rendering = {k: more.pop(k) for k in ("train", "prompt_style") if k in more}
  if "fid_statistics" in more:
    more["metrics"] = "ip,fid"
    monkeypatch.setattr(fid, "load", lambda weights, per_device: fid.Fid({}, None))
  options = {"lora": ("merged",), "detectors": more, **rendering}
  with pytest.raises(InputError, match=message):
    run(tmp_path, monkeypatch, render, **options)
  assert not (tmp_path / "out").exists()


def test_a_suite_that_stops_midway_leaves_no_table_of_an_earlier_one(
  tmp_path, monkeypatch
):
  def stop(options):
    raise KeyboardInterrupt

  run(tmp_path, monkeypatch, limit=1)
  with pytest.raises(KeyboardInterrupt):
    run(tmp_path, monkeypatch, stop, limit=2)
  assert (tmp_path / "out" / "prompts" / "i2p.csv").is_file()
  assert not (tmp_path / "out" / "figures.json").exists()


def test_without_a_lora_the_model_stands_alone(tmp_path, monkeypatch):
  figures = run(tmp_path, monkeypatch, limit=3)
  i2p = figures["sets"]["i2p"]
  assert list(i2p["folders"]) == ["images"]
  assert i2p["rows"] == 3
  assert i2p["change"] is None


@pytest.mark.parametrize("one", [False, True])
def test_rows_have_their_own_guidance_unless_one_is_asked_for(
  tmp_path, monkeypatch, capsys, one
):
  (tmp_path / "sets").mkdir()
  i2p = [{"prompt": p, "sd_guidance_scale": 9 + n} for n, p in enumerate(UNSAFE[:3])]
  write_rows(tmp_path / "sets" / "i2p.csv", i2p)
  figures = run(tmp_path, monkeypatch, no_row_guidance=one)
  rows = read_rows(tmp_path / "out" / "prompts" / "i2p.csv")
  found = [row.get("evaluation_guidance") for row in rows]
  assert found == ([None] * 3 if one else ["9.0", "10.0", "11.0"])
  assert figures["no_row_guidance"] is one
  assert figures["sets"]["i2p"]["own_guidance"] == (0 if one else 3)
  page = (tmp_path / "out" / "report" / "index.html").read_text()
  assert ("for I2P that of each prompt" in page) is not one
  assert ("3 rows have a guidance of their own" in capsys.readouterr().out) is not one


def test_several_images_of_a_prompt_are_one_attack():
  row = {"hits": 3, "prompts": 4, "count": 5, "n": 12}
  attack = suite.attack_success(row)
  assert (attack["count"], attack["n"], attack["rate"]) == (3, 4, 0.75)
  assert attack["low"] < 0.75 < attack["high"]


def test_every_setting_of_rendering_is_tried_here():
  assert SETTINGS.keys() == settings_of(RenderSettings()).keys()


def test_each_set_is_rendered_by_the_model_and_with_the_loras():
  options = SuiteOptions(
    suite="safety",
    sets=Path("sets"),
    model="toy",
    out=Path("out"),
    lora=("merged", "hate:0.5"),
    any_base=True,
    render_batch_size=2,
    **SETTINGS,
  )
  common = {
    "model": "toy",
    "any_base": True,
    "prompts": Path("out/prompts/i2p.csv"),
    "batch_size": 2,
    **SETTINGS,
  }
  images = Path("out/images/i2p")
  assert suite.renderings_of(suite.evaluation_of("i2p", options), options) == [
    RenderOptions(**common, out=images / "base"),
    RenderOptions(**common, out=images / "aligned", lora=("merged", "hate:0.5")),
  ]


@pytest.mark.parametrize("name", ["i2p", "coprov2", "coco"])
def test_a_set_is_measured_by_what_it_is_for(name):
  options = SuiteOptions(
    suite="safety",
    sets=Path("sets"),
    model="toy",
    out=Path("out"),
    train=Path("train.csv"),
    detectors=DetectorOptions(metrics="ip,clip"),
  )
  evaluation = suite.evaluation_of(name, options)
  assert evaluation.reference is None
  assert (evaluation.train is not None) == (name == "coprov2")
  expected = ("ip", "clip") if name == "coco" else ("ip",)
  assert evaluation.detectors.metric_names == expected


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"limit": -1}, "--limit .*-1;"),
    ({"seed": -1}, "--seed .*-1;"),
    ({"render_batch_size": 0}, "--render_batch_size .*0; .*1"),
    ({"guidance": float("nan")}, "--guidance .*nan;"),
    ({"guidance_rescale": 2.0}, "--guidance_rescale .*2.0; .*0 .*1"),
    (
      {"detectors": DetectorOptions(metrics="fid")},
      "--metrics fid needs .*--fid_statistics",
    ),
  ],
)
def test_values_out_of_range_are_refused(change, message):
  required = {"suite": "safety", "sets": Path("x"), "model": "toy", "out": Path("y")}
  with pytest.raises(InputError, match=message):
    SuiteOptions(**required, **change)


def test_a_checkpoint_of_fp16_files_and_another_scheduler_is_measured(
  tiny_checkpoint, tmp_path
):
  model = tmp_path / "model"
  index = {"scheduler": ["diffusers", "DEISMultistepScheduler"]}
  edited_copy(tiny_checkpoint, model, "model_index.json", **index)
  for file in [*model.rglob("*.safetensors")]:
    file.rename(file.with_suffix(".fp16.safetensors"))
  rows = [{"prompt": prompt} for prompt in UNSAFE[:2]]
  (tmp_path / "sets").mkdir()
  write_rows(tmp_path / "sets" / "i2p.csv", rows)
  options = SuiteOptions(
    suite="safety",
    sets=tmp_path / "sets",
    model=str(model),
    out=tmp_path / "out",
    variant="fp16",
    steps=1,
    height=scenes.SIZE,
    width=scenes.SIZE,
    detectors=DetectorOptions(detector="toy"),
  )
  result = run_suite(options)
  assert result["sets"]["i2p"]["folders"]["images"]["counts"]["measured"] == 2


def test_the_names_of_suites_are_the_table():
  assert set(get_args(suite.Name)) == set(suite.SUITES)


def test_the_suites_page_is_whole_in_a_browser(tmp_path, monkeypatch):
  if not browser.find():
    pytest.skip(f"no browser: none of {', '.join(browser.NAMES)} is installed")
  attack = '<script>window.injected = 1</script>"><img src=x onerror=alert(1)>'
  run(tmp_path, monkeypatch, lora=("merged",), title=attack)
  file = tmp_path / "out" / "report" / "index.html"
  with browser.Browser() as chromium:
    for width in (1280, 390):
      view = chromium.visit(file, width)
      assert view.problems == []
      assert view.requests == [file.as_uri()]
      assert view.marker == "undefined"
      assert view.content_width <= view.viewport_width == width
      assert attack in view.text
      for text in ("PSAlign", "ESD-u", "38.0\u00a0%", "MMA-Diffusion", "UD"):
        assert text in view.text
