"""encode stopped, run again, run twice, run on two hosts: always the same cache."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from safetydpo_jax.data.cache import records
from safetydpo_jax.errors import InputError
from tests.support.caches import PAIRS, contents, run
from tests.support.lookalike import write_folder_layout


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
  return write_folder_layout(tmp_path_factory.mktemp("data") / "pairs", PAIRS)


@pytest.fixture(scope="module")
def cache(tiny_checkpoint, dataset, tmp_path_factory):
  return run(tiny_checkpoint, dataset, tmp_path_factory.mktemp("cache") / "cache")


KILLED = """
import os, signal, sys
from safetydpo_jax import encode
from safetydpo_jax.data.cache import shards
write = shards.write_shard
def write_until_killed(file, records):
  def some():
    yield next(records)
    if "00001-of" in file.name:
      os.kill(os.getpid(), signal.SIGKILL)
    yield from records
  write(file, some())
shards.write_shard = write_until_killed
encode.main(sys.argv[1:])
"""


def test_killed_and_run_again_equals_uninterrupted(
  tiny_checkpoint, dataset, cache, tmp_path
):
  out = tmp_path / "cache"
  command = ["--model", tiny_checkpoint, "--pairs", dataset, "--out", out]
  command += ["--shard_size", 2]
  killed = subprocess.run(
    [sys.executable, "-c", KILLED, *map(str, command)],
    capture_output=True,
    check=False,
  )
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  names = {file.name for file in out.iterdir()}
  assert "pairs-00000-of-00003.arrayrecord" in names
  assert not {"cache.json", "pairs-00001-of-00003.arrayrecord"} & names
  with pytest.raises(InputError, match="is an unfinished pair cache; run the same"):
    records.open_cache(out)
  first = (out / "pairs-00000-of-00003.arrayrecord").stat().st_mtime_ns
  run(tiny_checkpoint, dataset, out)
  assert (out / "pairs-00000-of-00003.arrayrecord").stat().st_mtime_ns == first
  assert contents(out) == contents(cache.path)


class Killed(BaseException):
  """Not caught by anything, as a kill is not."""


# plan, three shards, index, manifest, and the plan's removal
MOMENTS = [("replace", n) for n in range(6)] + [("unlink", 0)]


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("call", "number"), MOMENTS)
def test_killed_between_any_two_files_and_run_again_equals_uninterrupted(
  tiny_checkpoint, dataset, cache, tmp_path, monkeypatch, call, number, done
):
  """A file is there or not after `os.replace`, so these are all the states."""
  where, calls = (os, "replace") if call == "replace" else (Path, "unlink"), []
  original = getattr(*where)

  def kill(file, *rest, **options):
    if tmp_path not in Path(file).parents:
      return original(file, *rest, **options)
    calls.append(file)
    if len(calls) <= number or done:
      original(file, *rest, **options)
    if len(calls) > number:
      raise Killed
    return None

  out = tmp_path / "cache"
  with monkeypatch.context() as patched:
    patched.setattr(*where, kill)
    with pytest.raises(Killed):
      run(tiny_checkpoint, dataset, out)
  run(tiny_checkpoint, dataset, out)
  whole = {n: c for n, c in contents(out).items() if not n.startswith(".")}
  assert whole == contents(cache.path)


def test_a_finished_cache_is_left_alone(tiny_checkpoint, dataset, cache, capsys):
  before = {file: file.stat().st_mtime_ns for file in cache.path.iterdir()}
  run(tiny_checkpoint, dataset, cache.path)
  assert "is complete already: 6 pairs" in capsys.readouterr().out
  assert {file: file.stat().st_mtime_ns for file in cache.path.iterdir()} == before


@pytest.mark.parametrize("lost", ["pairs-00001-of-00003.arrayrecord", "index.jsonl"])
def test_a_lost_file_is_made_again(tiny_checkpoint, dataset, cache, tmp_path, lost):
  out = shutil.copytree(cache.path, tmp_path / "cache")
  (out / lost).unlink()
  run(tiny_checkpoint, dataset, out)
  assert contents(out) == contents(cache.path)


OTHER = {
  "resolution": ("--resolution", 24, "resolution 16, now it is 24"),
  "dtype": ("--dtype", "bfloat16", "vae_dtype 'float32', now it is 'bfloat16'"),
  "category": ("--category", "hate", "category 'all', now it is 'hate'"),
  "shards": ("--shard_size", 3, "shard_size 2, now it is 3"),
}


@pytest.mark.parametrize("state", ["finished", "unfinished"])
@pytest.mark.parametrize(("name", "value", "message"), OTHER.values(), ids=OTHER)
def test_other_settings_are_refused(
  tiny_checkpoint, dataset, cache, tmp_path, name, value, message, state
):
  out = shutil.copytree(cache.path, tmp_path / "cache")
  if state == "unfinished":
    (out / "cache.json").rename(out / "plan.json")
  with pytest.raises(InputError, match=f"{message}; choose another --out, or delete"):
    run(tiny_checkpoint, dataset, out, name, value)


def test_another_dataset_is_refused(tiny_checkpoint, cache, tmp_path):
  other = write_folder_layout(tmp_path / "other", PAIRS, seed=1)
  with pytest.raises(InputError, match="holds a cache with dataset"):
    run(tiny_checkpoint, other, cache.path)


def test_a_plan_without_shards_may_change(tiny_checkpoint, dataset, tmp_path):
  out = tmp_path / "cache"
  out.mkdir()
  (out / "plan.json").write_text('{"batch_size": 512}')
  assert len(run(tiny_checkpoint, dataset, out)) == PAIRS


def test_two_processes_write_what_one_writes(tiny_checkpoint, dataset, cache, tmp_path):
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  out = tmp_path / "cache"
  command = ["--model", tiny_checkpoint, "--pairs", dataset, "--out", out]
  command += ["--shard_size", 2]
  environment = {
    **os.environ,
    "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
    "JAX_NUM_PROCESSES": "2",
    "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
  }
  processes = [
    subprocess.Popen(
      [sys.executable, "-m", "safetydpo_jax.encode", *map(str, command)],
      env={**environment, "JAX_PROCESS_ID": str(index)},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for index in (0, 1)
  ]
  try:
    outputs = [process.communicate(timeout=300)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [process.returncode for process in processes] == [0, 0], outputs
  assert contents(out) == contents(cache.path)


def test_shards_of_unknown_origin_are_not_taken_over(
  tiny_checkpoint, dataset, cache, tmp_path
):
  out = shutil.copytree(cache.path, tmp_path / "cache")
  (out / "cache.json").unlink()
  with pytest.raises(InputError, match=r"it has no plan\.json"):
    run(tiny_checkpoint, dataset, out)
