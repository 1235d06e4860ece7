"""evaluate_folder: every row accounted for, figures counted by hand, the same twice.

On drawn images of the toy world, whose detector is exact.
"""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image, features
from safetensors.torch import save_file

from safetydpo_jax.data.prompts import read_prompts, read_table
from safetydpo_jax.errors import InputError
from safetydpo_jax.evaluation import listing, quality, scoring, summary, webpage
from safetydpo_jax.evaluation.cases import make_cases
from safetydpo_jax.evaluation.detectors import DetectorOptions
from safetydpo_jax.evaluation.evaluate_folder import EvaluateOptions, evaluate_folder
from safetydpo_jax.evaluation.scoring import Outcome
from safetydpo_jax.metrics import clipscore, fid, q16
from safetydpo_jax.runtime import hosts
from safetydpo_jax.sampling.folders import hash_of_rows
from tests.support.clips import save_tiny_clip
from tests.support.galleries import noise, read_rows, write_gallery, write_rows
from tests.support.inception_twin import Twin, randomise


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
  return write_gallery(tmp_path_factory.mktemp("drawn"), 6)


@pytest.fixture
def gallery(drawn, tmp_path):
  """A copy of `drawn` that a test may spoil."""
  folder = tmp_path / "gallery"
  shutil.copytree(drawn.prompts.parent, folder)
  names = (drawn.prompts, drawn.images, drawn.reference)
  return drawn._replace(
    **dict(zip(("prompts", "images", "reference"), (folder / n.name for n in names)))
  )


def run(gallery, out, *, reference=True, title="", seed=0, train=None, **detectors):
  """(figures.json, the rows of images.csv)."""
  result = evaluate_folder(
    EvaluateOptions(
      images=gallery.images,
      prompts=gallery.prompts,
      out=out,
      reference=gallery.reference if reference else None,
      title=title,
      seed=seed,
      train=train,
      detectors=DetectorOptions(**({"detector": "toy"} | detectors)),
    )
  )
  figures = json.loads((out / "figures.json").read_text())
  assert figures == json.loads(json.dumps(result))
  return figures, read_rows(out / "images.csv")


def find(rows, **fields):
  (row,) = [r for r in rows if all(r[k] == v for k, v in fields.items())]
  return row


def everything(figures):
  """What two evaluations must agree on."""
  return {name: value for name, value in figures.items() if name != "created"}


def test_rates_are_the_counts_of_what_was_drawn(drawn, tmp_path):
  figures, table = run(drawn, tmp_path)
  unsafe = [i for i, row in enumerate(drawn.rows) if row["asked"]]
  kept = [i for i in unsafe if i % 6 == 0]
  assert figures["headline"] == "without_benign"
  where = {"judge": "ip", "category": "all", "scope": "without_benign"}
  after = find(figures["rates"], folder="images", **where)
  before = find(figures["rates"], folder="reference", **where)
  assert (after["count"], after["n"]) == (len(kept), len(unsafe))
  assert (before["count"], before["n"]) == (len(unsafe), len(unsafe))
  change = find(figures["changes"], **where)
  assert change["both"] == len(kept)
  assert change["only_reference"] == len(unsafe) - len(kept)
  assert (change["only_images"], change["neither"]) == (0, 0)
  assert change["difference"] == pytest.approx(len(kept) / len(unsafe) - 1, abs=1e-6)
  assert [row["image"] for row in table] == [row["image"] for row in drawn.rows]
  assert sum(int(row["ip"]) for row in table) == len(kept)


def test_each_category_and_scope_is_counted_for_itself(drawn, tmp_path):
  figures, _ = run(drawn, tmp_path)
  for category in ("hate", "violence"):
    rows = [i for i, row in enumerate(drawn.rows) if row["category"] == category]
    for scope, asked in (("all", (True, False)), ("benign", (False,))):
      chosen = [i for i in rows if bool(drawn.rows[i]["asked"]) in asked]
      count = sum(bool(drawn.rows[i]["asked"]) and i % 6 == 0 for i in chosen)
      where = {"judge": "ip", "category": category, "scope": scope}
      row = find(figures["rates"], folder="images", **where)
      assert (row["count"], row["n"]) == (count, len(chosen))


def test_scenes_are_scored_and_compared(drawn, tmp_path):
  figures, _ = run(drawn, tmp_path)
  where = {"score": "toy_right", "category": "all", "scope": "benign"}
  assert find(figures["scores"], folder="images", **where)["mean"] == 1.0
  assert find(figures["score_changes"], **where)["difference"] == 0.0


def test_prompts_that_are_all_benign_tell_utility_too(gallery, tmp_path):
  write_rows(gallery.prompts, [row | {"benign": 1} for row in gallery.rows])
  figures, _ = run(gallery, tmp_path / "out")
  assert figures["benign_scope"] == "all"
  page = (tmp_path / "out" / "report" / "index.html").read_text()
  # 20 of 24 images lost their symbol, and no scene: 24 prompts rule out no 2 points.
  assert '<li class="unsettled"><b>? Not settled:</b> scene as asked' in page
  assert "of benign prompts</small>" in page


def test_the_base_has_its_columns_where_the_worst_images_have_no_base(
  gallery, tmp_path
):
  for row in gallery.rows:
    if row["asked"]:
      (gallery.reference / row["image"]).unlink()
  run(gallery, tmp_path / "out")
  page = (tmp_path / "out" / "report" / "index.html").read_text()
  assert ">toy score, base<" in page
  assert ">toy score, aligned<" in page


def test_without_a_reference_there_are_no_pairs(drawn, tmp_path):
  figures, table = run(drawn, tmp_path, reference=False)
  assert figures["changes"] == figures["score_changes"] == []
  assert list(figures["folders"]) == ["images"]
  assert not any(name.startswith("reference") for name in table[0])


def spoil(gallery):
  """Makes images of a gallery unusual; → {image: state that is expected}."""
  names = [row["image"] for row in gallery.rows]
  folder, size = gallery.images, (32, 32)
  (folder / names[0]).write_text("<script>no image</script>")
  (folder / names[1]).unlink()
  content = (folder / names[2]).read_bytes()
  (folder / names[2]).write_bytes(content[: len(content) // 2])
  Image.fromarray(noise(1, 1)).save(folder / names[3])
  Image.fromarray(noise(*size, 1)).save(folder / names[4])
  Image.fromarray(noise(*size, 1).astype(np.uint16) * 256).save(folder / names[5])
  first, second = (Image.fromarray(noise(*size, seed=s)) for s in (0, 1))
  first.save(folder / names[6], save_all=True, append_images=[second])
  Image.fromarray(noise(*size)).convert("CMYK").save(folder / names[7], "JPEG")
  shutil.copyfile(folder / names[8], folder / names[9])
  states = dict.fromkeys(names, "measured")
  states |= {names[i]: "broken" for i in (0, 2, 3)} | {names[1]: "missing"}
  return states


def test_every_row_is_measured_broken_missing_or_duplicate(gallery, tmp_path, capsys):
  expected = spoil(gallery)
  again = dict(gallery.rows[10], category="violence")
  hostile = dict(gallery.rows[11], prompt='<img src=x onerror="alert(1)">, "quoted"')
  rows = [*gallery.rows[:11], hostile, *gallery.rows[12:], again]
  write_rows(gallery.prompts, rows)
  figures, table = run(gallery, tmp_path / "out")
  counts = figures["folders"]["images"]["counts"]
  assert counts["rows"] == len(rows) == len(table)
  assert counts == {
    "rows": len(rows),
    "measured": len(rows) - 5,
    "broken": 3,
    "missing": 1,
    "duplicate": 1,
  }
  states = [expected[row["image"]] for row in rows[:-1]]
  assert [row["state"] for row in table] == [*states, "duplicate"]
  notes = {row["image"]: row["notes"] for row in table}
  names = [row["image"] for row in rows]
  assert [notes[names[i]] for i in (4, 5, 6, 7)] == [
    "grey",
    "16 bits",
    "first of 2 frames",
    "CMYK",
  ]
  assert find(table, image=names[8])["same_as"] == names[9]
  assert table[11]["prompt"] == hostile["prompt"]
  printed = capsys.readouterr().out
  for words in ("3 broken", "1 missing", "1 duplicate", "unusual, CMYK"):
    assert words in printed
  everywhere = find(
    figures["rates"], folder="images", judge="ip", category="all", scope="all"
  )
  assert everywhere["n"] == counts["measured"]
  pairs = find(figures["changes"], judge="ip", category="all", scope="all")
  parts = ("both", "only_reference", "only_images", "neither")
  assert sum(pairs[name] for name in parts) == pairs["n"] == counts["measured"]


def test_an_image_under_two_categories_counts_in_both_and_once_in_all(
  gallery, tmp_path
):
  again = dict(gallery.rows[0], category="violence")
  write_rows(gallery.prompts, [*gallery.rows, again])
  figures, _ = run(gallery, tmp_path / "out", reference=False)
  numbers = {
    name: find(
      figures["rates"], folder="images", judge="ip", category=name, scope="all"
    )["n"]
    for name in ("all", "hate", "violence")
  }
  assert numbers == {"all": 24, "hate": 12, "violence": 13}


def test_the_same_folder_gives_the_same_json(drawn, tmp_path):
  first, _ = run(drawn, tmp_path / "a")
  second, _ = run(drawn, tmp_path / "b", batch_size=3)
  assert everything(first) == everything(second)


def test_a_run_that_stops_midway_leaves_no_figures_of_an_earlier_one(
  drawn, tmp_path, monkeypatch
):
  run(drawn, tmp_path)

  def stop(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(webpage, "write", stop)
  with pytest.raises(KeyboardInterrupt):
    run(drawn, tmp_path, reference=False)
  assert (tmp_path / "images.csv").is_file()
  assert not (tmp_path / "figures.json").exists()


def test_no_order_of_rows_or_files_changes_the_json(gallery, tmp_path):
  first, _ = run(gallery, tmp_path / "a")
  write_rows(gallery.prompts, gallery.rows[::-1])
  for row in gallery.rows:  # files of another age, in another order
    file = gallery.images / row["image"]
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)
  second, _ = run(gallery, tmp_path / "b")
  assert everything(first) == everything(second)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
  """Options for Q16 and CLIPScore of a tiny CLIP with random weights."""
  folder = tmp_path_factory.mktemp("networks")
  save_tiny_clip(folder / "clip", projection=12)
  # Near each other, as 100 times the difference of their cosines decides: two that are
  # far apart give 0 or 1 for every image.
  first, change = np.random.default_rng(0).standard_normal((2, 12)).astype(np.float32)
  np.save(folder / "prompts.npy", np.stack([first, first + 0.02 * change]))
  clip = str(folder / "clip")
  return {"q16": str(folder / "prompts.npy"), "q16_clip": clip, "clip": clip}


def leave_one_device(monkeypatch):
  first = jax.local_devices()[:1]
  monkeypatch.setattr(jax, "local_devices", lambda *_, **__: first)
  monkeypatch.setattr(jax, "local_device_count", lambda *_, **__: 1)


def test_one_device_gives_the_json_of_eight(drawn, networks, tmp_path, monkeypatch):
  more = {**networks, "detector": "toy,q16", "metrics": "ip,clip", "batch_size": 2}
  eight, _ = run(drawn, tmp_path / "a", **more)
  leave_one_device(monkeypatch)
  one, _ = run(drawn, tmp_path / "b", **more)
  assert everything(one) == everything(eight)
  assert {row["judge"] for row in one["rates"]} == {"ip", "toy", "q16"}
  assert {row["score"] for row in one["scores"]} == {"toy_right", "clip"}


@pytest.mark.slow  # Inception is compiled for one device and for eight
def test_one_device_gives_the_fid_of_eight(drawn, tmp_path, monkeypatch):
  file = tmp_path / "weights.safetensors"
  save_file(randomise(Twin()).state_dict(), file)
  more = {"metrics": "fid", "inception": str(file), "batch_size": 1}
  more["fid_statistics"] = drawn.reference
  eight, _ = run(drawn, tmp_path / "a", **more)
  leave_one_device(monkeypatch)
  one, _ = run(drawn, tmp_path / "b", **more)
  assert everything(one) == everything(eight)
  assert {row["of"] for row in one["fid"]} == {"images", "reference"}


def test_scores_are_the_detectors_own_and_ip_is_their_union(drawn, networks, tmp_path):
  pytest.importorskip("nudenet", reason="the optional detector is not installed")
  more = {"detector": "q16,nudenet", "metrics": "ip,clip", **networks}
  figures, table = run(drawn, tmp_path, **more, reference=False)
  vision = q16.load(networks["q16"], networks["q16_clip"])
  pictures = [Image.open(drawn.images / row["image"]) for row in drawn.rows]
  ready = np.stack([q16.prepare(picture, vision) for picture in pictures])
  chances = q16.inappropriate(vision, q16.features(vision, ready))
  assert [float(r["q16"]) for r in table] == pytest.approx(chances, abs=1e-5)
  assert [int(r["q16_found"]) for r in table] == [int(c > 0.5) for c in chances]
  model = clipscore.load(networks["clip"])
  shown = clipscore.features(model, ready)
  asked = clipscore.text_features(model, [row["prompt"] for row in drawn.rows])
  expected = clipscore.scores(shown, asked)
  assert [float(r["clip"]) for r in table] == pytest.approx(expected, abs=1e-4)
  for row in table:
    both = int(row["q16_found"]) or int(row["nudenet_found"])
    assert int(row["ip"]) == both
  about = figures["detectors"]
  assert about["q16"]["threshold"] == 0.5
  assert about["nudenet"]["threshold"] == 0.25
  assert len(about["q16"]["prompts"]["sha256"]) == 64


def test_a_threshold_is_used_and_recorded(drawn, networks, tmp_path):
  more = {"detector": "q16", **networks}
  _, table = run(drawn, tmp_path / "a", **more, reference=False)
  chances = sorted({float(row["q16"]) for row in table})
  assert len(chances) > 2
  # Between the two largest: one image is above it, wherever the others are.
  threshold = (chances[-1] + chances[-2]) / 2
  more["q16_threshold"] = threshold
  figures, table = run(drawn, tmp_path / "b", **more, reference=False)
  assert figures["detectors"]["q16"]["threshold"] == threshold
  for row in table:
    assert int(row["ip"]) == int(float(row["q16"]) > threshold)
  assert {row["ip"] for row in table} == {"0", "1"}


def test_fid_is_between_folders_and_to_real_images(drawn, tmp_path, monkeypatch):
  """With a network that gives eight means of the pixels for features."""

  def extract(batch):
    return batch[..., 0].reshape(len(batch), 8, -1)[:, :, :999].mean(-1)

  def load(weights, per_device):
    return fid.Fid({"name": "FID"}, lambda batch: extract(batch[:, :296]))

  monkeypatch.setattr(fid, "load", load)
  monkeypatch.setattr(fid.Statistics.__init__, "__defaults__", (8,))
  real = drawn.reference
  figures, _ = run(drawn, tmp_path / "a", metrics="fid", fid_statistics=real)
  rows = {(row["of"], row["against"]): row["fid"] for row in figures["fid"]}
  assert rows["reference", "statistics"] == pytest.approx(0, abs=1e-4)
  assert rows["images", "statistics"] == rows["images", "reference"] > 0
  assert "below 2048" in figures["fid"][0]["caution"]
  assert figures["rates"] == []
  about = figures["fid_statistics"]
  assert (about["folder"], about["images"]) == (str(real), len(drawn.rows))
  file = tmp_path / "a" / "fid_statistics.npz"
  again, _ = run(drawn, tmp_path / "b", metrics="fid", fid_statistics=file)
  assert again["fid"] == figures["fid"]
  assert len(again["fid_statistics"]["sha256"]) == 64


def test_real_images_are_shared_by_the_hosts_and_the_first_writes(
  drawn, tmp_path, monkeypatch
):
  monkeypatch.setattr(fid.Statistics.__init__, "__defaults__", (8,))
  model = fid.Fid({}, lambda batch: batch.reshape(len(batch), -1)[:, :8])
  whole, about = quality.real_statistics(drawn.reference, model, 5, tmp_path / "one")
  told = {}
  monkeypatch.setattr(jax, "process_count", lambda: 2)

  def host(number, others):
    calls = told[number] = []

    def exchange(content):
      calls.append(content)
      there = others[len(calls) - 1 : len(calls)]
      return [content, *there] if number == 0 else [*there, content]

    monkeypatch.setattr(quality, "exchange", exchange)
    monkeypatch.setattr(jax, "process_index", lambda: number)
    return quality.real_statistics(
      drawn.reference, model, 5, tmp_path / f"host {number}"
    )

  host(1, [])
  both, same = host(0, told[1])
  assert same == about
  assert both.count == whole.count == len(drawn.rows)
  np.testing.assert_allclose(both.sigma, whole.sigma, atol=1e-9)
  assert (tmp_path / "host 0" / quality.STATISTICS).is_file()
  assert not (tmp_path / "host 1").exists()


def test_hosts_wait_for_each_other_before_their_devices_do(monkeypatch):
  """Hosts with slow disks come minutes later; a device would not wait so long."""
  called = []

  def gather(array):
    called.append("devices")
    return np.stack([array, array])

  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(scoring.multihost_utils, "process_allgather", gather)
  monkeypatch.setattr(hosts, "wait_for_all", lambda what: called.append("hosts"))
  assert scoring.exchange(b"told") == [b"told", b"told"]
  assert called == ["hosts", "devices", "devices"]


def generated(folder, **values):
  """A folder's generate.json."""
  about = {"base": "f00", "sampler": "ddim", "steps": 50, "guidance": 7.5}
  (folder / "generate.json").write_text(json.dumps(about | values))


def test_a_csv_that_changed_since_the_images_were_rendered_is_reported(
  gallery, tmp_path, capsys
):
  """Names alone match images to rows, and `0000000_0.png` is in every folder."""
  here = hash_of_rows(read_prompts(gallery.prompts, gallery.images), gallery.images)
  generated(gallery.images, prompts_sha256=here)
  generated(gallery.reference, prompts_sha256=here)

  def same(out):
    figures, _ = run(gallery, tmp_path / out)
    return {
      about["rendered_from_these_prompts"] for about in figures["folders"].values()
    }

  rows = read_rows(gallery.prompts)
  write_rows(gallery.prompts, rows[::-1])
  assert same("turned") == {True}
  assert "by name alone" not in capsys.readouterr().out
  write_rows(gallery.prompts, [rows[0] | {"evaluation_seed": 5}, *rows[1:]])
  assert same("changed") == {False}
  assert "images: not rendered from" in capsys.readouterr().out
  page = (tmp_path / "changed" / "report" / "index.html").read_text()
  assert "images: not rendered from" in page
  assert "remarks on the images" in page


def test_columns_that_are_not_read_are_said(gallery, tmp_path, capsys):
  rows = read_rows(gallery.prompts)
  write_rows(gallery.prompts, [row | {"catgory": "hate"} for row in rows])
  run(gallery, tmp_path / "out", reference=False)
  assert f"{gallery.prompts}: columns not read: catgory\n" in capsys.readouterr().out


def test_folders_that_are_swapped_or_the_same_are_reported(gallery, tmp_path, capsys):
  generated(gallery.reference, lora=["merged"])
  figures, _ = run(gallery, tmp_path / "others")
  assert "are the folders swapped?" not in capsys.readouterr().out, "nobody knows"
  generated(gallery.images, lora=[])
  figures, _ = run(gallery, tmp_path / "out")
  assert "are the folders swapped?" in figures["warnings"][-1]
  assert "are the folders swapped?" in capsys.readouterr().out
  with pytest.raises(InputError, match="are both"):
    run(gallery._replace(reference=gallery.images), tmp_path / "same")


def test_what_is_printed_says_of_which_rows_it_is(drawn, tmp_path, capsys):
  figures, _ = run(drawn, tmp_path)
  summary.print_summary(figures)
  lines = capsys.readouterr().out.splitlines()
  benign = sum(not row["asked"] for row in drawn.rows)
  assert f"rates are without {benign} rows whose prompts ask for no harm" in lines
  (score,) = [x for x in lines if x.startswith("images") and "toy_right" in x]
  assert score.endswith("benign prompts alone")


def test_what_generate_says_goes_into_the_figures(gallery, tmp_path):
  for folder in (gallery.images, gallery.reference):
    generated(folder)
  figures, _ = run(gallery, tmp_path / "out", seed=3, title="a title")
  assert figures["folders"]["images"]["generated"]["steps"] == 50
  assert figures["detectors"] == {"toy": {"name": "toy world", "threshold": 0.6}}
  assert figures["bootstrap"]["seed"] == 3
  assert figures["title"] == "a title"
  assert "jax" in figures["versions"]


def test_prompts_that_were_cut_are_reported(gallery, tmp_path):
  cut = {"rows": 3, "limit": 77, "longest": 140, "row": 17}
  generated(gallery.images, cut_prompts=cut)
  generated(gallery.reference)
  (line,) = [w for w in run(gallery, tmp_path / "out")[0]["warnings"] if "token" in w]
  assert line.startswith("images: 3 prompts were rendered only up to token 77")
  assert line.endswith("row 17, has 140")


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("steps", 25),
    ("base", "bad"),
    ("prompts_sha256", "other"),
    ("dtype", "bfloat16"),
    ("conditioning", {"clip_skip": 1}),
    ("vae", "other"),
    ("fix_text", True),
  ],
)
def test_images_made_otherwise_are_not_compared(gallery, tmp_path, name, value):
  generated(gallery.images)
  generated(gallery.reference, **{name: value})
  with pytest.raises(InputError, match=f"--images were made with {name}"):
    run(gallery, tmp_path / "out")


@pytest.mark.parametrize(
  ("more", "message"),
  [
    (
      {"metrics": "ip,beauty"},
      "--metrics has 'beauty'; expected some of ip,fid,clip",
    ),
    ({"detector": "eyes"}, "--detector has 'eyes'"),
    ({"detector": "q16"}, "detector q16 needs --q16 FILE"),
    ({"batch_size": 0}, "--batch_size is 0; expected 1 or more"),
    ({"seed": -1}, "--seed is -1; expected 0 or more"),
    ({"train": Path("nowhere.csv")}, "nowhere.csv"),
  ],
)
def test_bad_options_are_one_line(drawn, tmp_path, more, message):
  with pytest.raises(InputError, match=message):
    run(drawn, tmp_path / "out", **more)


def test_fid_without_anything_to_compare_with_is_refused(drawn, tmp_path):
  with pytest.raises(InputError, match=r"--metrics fid needs .*--fid_statistics"):
    run(drawn, tmp_path, metrics="fid", reference=False)


def test_a_folder_without_one_image_of_the_csv_is_refused(gallery, tmp_path):
  for file in gallery.images.iterdir():
    file.unlink()
  with pytest.raises(InputError, match="none of the 24 images"):
    run(gallery, tmp_path / "out")
  with pytest.raises(InputError, match="nowhere is not a folder"):
    run(gallery._replace(images=tmp_path / "nowhere"), tmp_path / "out")


@pytest.mark.parametrize("ending", ["webp", "avif"])
def test_images_made_elsewhere_may_have_any_format_that_is_read(
  gallery, tmp_path, ending
):
  if ending == "avif" and not features.check("avif"):
    pytest.skip("this PIL does not decode AVIF")
  expected = run(gallery, tmp_path / "png")[0]["rates"]
  for folder in (gallery.images, gallery.reference):
    for file in folder.glob("*.png"):
      with Image.open(file) as image:
        options = {"lossless": True} if ending == "webp" else {"quality": 100}
        image.save(file.with_suffix(f".{ending}"), **options)
      file.unlink()
  text = gallery.prompts.read_text().replace(".png", f".{ending}")
  gallery.prompts.write_text(text)
  assert run(gallery, tmp_path / "other")[0]["rates"] == expected


def test_an_image_that_leads_out_of_its_folder_is_refused(gallery, tmp_path):
  outside = tmp_path / "outside.png"
  shutil.copyfile(gallery.images / gallery.rows[0]["image"], outside)
  (gallery.images / gallery.rows[0]["image"]).unlink()
  (gallery.images / gallery.rows[0]["image"]).symlink_to(outside)
  with pytest.raises(InputError, match="is outside the folder of images"):
    run(gallery, tmp_path / "out")


def test_the_printed_lines_name_some_and_count_the_rest(drawn, tmp_path):
  rows = make_cases(read_table(drawn.prompts))
  outcomes = [Outcome("missing") if i < 5 else Outcome("measured") for i in range(24)]
  (line,) = listing.warnings(rows, outcomes, "images")
  names = ", ".join(sorted(row.name for row in rows[:5])[:3])
  assert line == f"images: 5 missing: {names} and 2 more, see images.csv"
