"""encode: the same cache from every layout and place, and what of broken images."""

import json
import shutil

import chex
import numpy as np
import pytest
from PIL import Image

from safetydpo_jax import encode
from safetydpo_jax.data.cache import batches, encode_dataset, records
from safetydpo_jax.errors import InputError
from tests.support import buckets
from tests.support.caches import PAIRS, contents, run
from tests.support.lookalike import LAYOUTS


@pytest.fixture(scope="module")
def cache(tiny_checkpoint, tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  pairs = LAYOUTS["folder"](folder / "pairs", pairs=PAIRS)
  return run(tiny_checkpoint, pairs, folder / "cache")


def feed(cache, host=0, hosts=1):
  return list(
    batches.train_batches(
      cache,
      category=None,
      mixture="both",
      batch_size=4,
      seed=3,
      start_step=0,
      steps=9,
      rows=np.arange(4).reshape(hosts, -1)[host],
    )
  )


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "folder"])
def test_every_layout_gives_the_same_cache_and_batches(
  tiny_checkpoint, cache, tmp_path, layout
):
  dataset = LAYOUTS[layout](tmp_path / "pairs", pairs=PAIRS)
  other = run(tiny_checkpoint, dataset, tmp_path / "cache")
  assert contents(other.path) == contents(cache.path)
  ours, theirs = feed(cache), feed(other)
  chex.assert_trees_all_equal(ours, theirs)
  halves = zip(feed(other, 0, 2), feed(other, 1, 2), strict=True)
  joined = [
    batches.Batch(
      np.concatenate([a.moments, b.moments]),
      tuple(map(np.concatenate, zip(a.token_ids, b.token_ids))),
    )
    for a, b in halves
  ]
  chex.assert_trees_all_equal(joined, ours)


def damage(folder):
  """Pair 2's unsafe image is cut off, pair 4's safe one and pair 5's are gone."""
  cut = folder / "u_idx_0000002_0.jpg"
  cut.write_bytes(cut.read_bytes()[:300])
  for name in ("s_idx_0000004_0.jpg", "s_idx_0000005_0.jpg", "u_idx_0000005_0.jpg"):
    (folder / name).unlink()


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "prepared"])
def test_pairs_with_broken_images_are_left_out_if_asked(
  tiny_checkpoint, cache, tmp_path, layout, capsys
):
  dataset = LAYOUTS[layout](tmp_path / "pairs", pairs=PAIRS, damage=damage)
  with pytest.raises(InputError, match=r"does not exist|cannot be read"):
    run(tiny_checkpoint, dataset, tmp_path / "failed")
  other = run(tiny_checkpoint, dataset, tmp_path / "cache", "--on_error", "skip")
  assert "left out 3 pairs; the first: " in capsys.readouterr().out
  kept = [0, 1, 3]
  assert [entry.id for entry in other.index] == [cache.index[n].id for n in kept]
  for number, same in enumerate(kept):
    chex.assert_trees_all_equal(other[number], cache[same])
    assert other.about(number) == cache.about(same)
  counts = other.manifest["counts"]
  assert (counts["pairs"], counts["captions"], counts["skipped"]) == (3, 6, 3)
  lines = other.manifest["skipped"]
  assert len(lines) == 3
  assert "_idx_0000002_0.jpg" in " ".join(lines)
  run(tiny_checkpoint, dataset, tmp_path / "cache", "--on_error", "skip")
  assert "is complete already: 3 pairs" in capsys.readouterr().out


def test_pairs_left_out_before_are_fatal_when_none_may_be(tiny_checkpoint, tmp_path):
  def cut(folder):
    (folder / "u_idx_0000002_0.jpg").write_bytes(b"<html>")

  dataset = LAYOUTS["csv"](tmp_path / "pairs", pairs=PAIRS, damage=cut)
  run(tiny_checkpoint, dataset, tmp_path / "cache", "--on_error", "skip")
  with pytest.raises(InputError, match=r"cache lacks 1 pairs .* s_idx_0000002_0\.jpg>"):
    run(tiny_checkpoint, dataset, tmp_path / "cache")


def test_the_right_pairs_are_left_out_of_a_shard_of_several_batches(
  tiny_checkpoint, cache, tmp_path
):
  """Eight images are a batch here, so pairs 4 and 5 are in the second one."""
  dataset = LAYOUTS["hub"](tmp_path / "pairs", pairs=PAIRS, damage=damage)
  arguments = ("--on_error", "skip", "--shard_size", PAIRS)
  other = run(tiny_checkpoint, dataset, tmp_path / "cache", *arguments)
  assert [other.about(n)["id"] for n in range(3)] == [
    cache.index[n].id for n in (0, 1, 3)
  ]
  assert {line.split(":")[0] for line in other.manifest["skipped"]} == {
    cache.index[n].id for n in (2, 4, 5)
  }


def test_what_was_left_out_is_remembered_over_a_restart(tiny_checkpoint, tmp_path):
  def cut(folder):
    for number in (0, 1, 2):
      (folder / f"s_idx_000000{number}_0.jpg").write_bytes(b"<html>")

  dataset = LAYOUTS["csv"](tmp_path / "pairs", pairs=PAIRS, damage=cut)
  whole = run(tiny_checkpoint, dataset, tmp_path / "cache", "--on_error", "skip")
  assert [shard["records"] for shard in whole.manifest["shards"]] == [0, 1, 2]
  again = shutil.copytree(whole.path, tmp_path / "again")
  for name in ("cache.json", "index.jsonl", "pairs-00001-of-00003.arrayrecord"):
    (again / name).unlink()
  settings = json.loads((whole.path / "cache.json").read_text())
  (again / "plan.json").write_text(json.dumps(settings))
  run(tiny_checkpoint, dataset, again, "--on_error", "skip")
  assert contents(again) == contents(whole.path)


def test_what_is_left_out_is_noted_before_the_shard_is_complete(tmp_path):
  """A shard that is there is kept, so a kill in between would lose the note."""
  made = encode_dataset.make_records(
    tmp_path / "x.arrayrecord", iter(()), (), {"a>b": "gone"}
  )
  assert list(made) == []
  assert [file.name for file in tmp_path.iterdir()] == ["x.skipped.json"]


def test_a_cache_of_nothing_is_an_error(tiny_checkpoint, tmp_path):
  def ruin(folder):
    for file in folder.iterdir():
      file.write_bytes(b"")

  dataset = LAYOUTS["csv"](tmp_path / "pairs", pairs=2, damage=ruin)
  with pytest.raises(InputError, match="none of 2 pairs could be encoded"):
    run(tiny_checkpoint, dataset, tmp_path / "cache", "--on_error", "skip")


@pytest.fixture
def bucket():
  buckets.use_bucket()
  return "gs://bucket"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pairs_and_cache_may_lie_in_a_store(
  tiny_checkpoint, cache, tmp_path, layout, bucket
):
  local = LAYOUTS[layout](tmp_path / "pairs", pairs=PAIRS)
  dataset = buckets.upload(local, f"{bucket}/pairs")
  shutil.rmtree(local)
  other = run(tiny_checkpoint, dataset, f"{bucket}/out/cache")
  chex.assert_trees_all_equal(feed(other), feed(cache))
  stored = {
    name.rpartition("/")[2]: file.getvalue()
    for name, file in buckets.STORE.items()
    if "/out/cache/" in name
  }
  ours = {file.name: file.read_bytes() for file in cache.path.iterdir()}
  assert stored.keys() == ours.keys()
  for name in stored.keys() - {"cache.json"}:
    assert stored[name] == ours[name]


def test_an_encode_to_a_store_goes_on_where_it_stopped(
  tiny_checkpoint, cache, bucket, monkeypatch, capsys
):
  dataset = buckets.upload(cache.path.parent / "pairs", f"{bucket}/pairs")
  run(tiny_checkpoint, dataset, f"{bucket}/cache")
  run(tiny_checkpoint, dataset, f"{bucket}/cache")
  assert "is complete already" in capsys.readouterr().out
  before = dict(buckets.STORE)
  for name in ("cache.json", "index.jsonl", "pairs-00001-of-00003.arrayrecord"):
    del buckets.STORE[f"/bucket/cache/{name}"]
  buckets.Bucket().pipe_file(
    "/bucket/cache/plan.json", before["/bucket/cache/cache.json"].getvalue()
  )
  with pytest.raises(InputError, match="gs://bucket/cache is an unfinished pair cache"):
    records.open_cache(f"{bucket}/cache")
  run(tiny_checkpoint, dataset, f"{bucket}/cache")
  after = buckets.STORE
  assert after.keys() == before.keys()
  for name in before:
    assert after[name].getvalue() == before[name].getvalue()
  kept = "/bucket/cache/pairs-00000-of-00003.arrayrecord"
  assert after[kept] is before[kept], "it was not written again"


def test_stats_needs_no_model(cache, tmp_path, capsys):
  out = tmp_path / "sheet.png"
  encode.main(["--pairs", str(cache.path.parent / "pairs"), "--stats", str(out)])
  assert Image.open(out).format == "PNG"
  assert "6 pairs" in capsys.readouterr().out
  blurred = out.read_bytes()
  arguments = ["--pairs", str(cache.path.parent / "pairs"), "--stats", str(out)]
  encode.main([*arguments, "--no_blur"])
  assert out.read_bytes() != blurred


def test_stats_of_a_table_alone_counts_what_is_in_it(cache, tmp_path, capsys):
  table = LAYOUTS["csv"](tmp_path / "pairs", pairs=PAIRS)
  shutil.rmtree(table / "images")
  encode.main(["--pairs", str(table), "--stats", str(tmp_path / "sheet.png")])
  printed = capsys.readouterr().out
  assert "sheet.png: 6 pairs" in printed
  assert "rows 16, pairs 6, captions 12, repeated 4, hate 2, sexual 1" in printed
  with pytest.raises(InputError, match="does not exist"):
    encode.main(["--model", "x", "--pairs", str(table), "--out", str(tmp_path / "c")])


def test_a_row_without_a_caption_is_left_out_and_counted(
  tiny_checkpoint, cache, tmp_path, capsys
):
  dataset = LAYOUTS["folder"](tmp_path / "pairs", pairs=PAIRS)
  lines = (dataset / "metadata.jsonl").read_text().splitlines(keepends=True)
  row = {**json.loads(lines[0]), "caption": None}
  (dataset / "metadata.jsonl").write_text("".join([json.dumps(row) + "\n", *lines[1:]]))
  other = run(tiny_checkpoint, dataset, tmp_path / "cache", "--on_error", "skip")
  printed = capsys.readouterr().out
  assert "left out 1 rows without a caption; the first: " in printed
  counts = other.manifest["counts"]
  assert (counts["pairs"], counts["captions"], counts["without_caption"]) == (6, 11, 1)
  assert other.index[0].slots == ("safe",)
  assert "without_caption" not in cache.manifest["counts"]


def test_prompts_are_repaired_if_asked(tiny_checkpoint, cache, tmp_path, capsys):
  dataset = LAYOUTS["csv"](tmp_path / "pairs", pairs=PAIRS)
  file = dataset / "train.csv"
  file.write_text(file.read_text().replace("~ tildes", "“tildes”"))
  other = run(tiny_checkpoint, dataset, tmp_path / "cache", "--fix_text")
  printed = capsys.readouterr().out
  assert f"changes 2 of 12 prompts; the first: {cache.index[0].id}" in printed
  assert '"tildes"' in other.about(0)["captions"]["safe"]
  plain = run(tiny_checkpoint, dataset, tmp_path / "plain")
  assert other.manifest["fix_text"] is True
  assert "fix_text" not in plain.manifest
  assert plain.manifest["dataset"] != other.manifest["dataset"]
  assert (plain[0]["token_ids"] != other[0]["token_ids"]).any()


@pytest.mark.parametrize(
  "arguments", [[], ["--out", "x"], ["--model", "x"], ["--model", "x", "--stats", "y"]]
)
def test_model_and_out_belong_together(arguments):
  with pytest.raises(InputError, match="--model and --out are needed together"):
    encode.main(["--pairs", "x", *arguments])
