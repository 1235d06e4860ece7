"""Launchers: what they would run, that a dry run runs nothing, and their quoting.

Programs that the launchers call are replaced by ones that write down their arguments.
"""

import json
import os
import pathlib
import re
import shlex
import shutil
import stat
import subprocess
import sys

import pytest

from safetydpo_jax import train
from safetydpo_jax.data.categories import CATEGORIES
from tests.support import documents
from tests.support.runs import ROOT

SCRIPTS = ["launch/gpu.sh", "launch/slurm.sbatch", "launch/tpu_vm.sh"]
SCRIPTS += ["launch/gke_xpk.sh"]
OPTIONS = {"launch/gke_xpk.sh": ["--cluster", "tpus", "--image", "registry/image"]}
PROGRAMS = ("gcloud", "docker", "xpk", "srun", "scontrol", "git", "python", "mkdir")
PROGRAMS += ("ssh-add", "ssh-agent")
SAY = {"ssh-agent": "true"}  # which is evaluated

# Every character that a shell would make something of.
NASTY = "a b'c\"d$HOME`e`\\f;g*&|é"
CONFIG = ["--config", "configs/hate.py:sd15"]


@pytest.fixture
def calls(tmp_path):
  """An environment with recording programs, and the calls so far (a function)."""
  folder, log = tmp_path / "bin", tmp_path / "calls"
  folder.mkdir()
  log.touch()
  for name in PROGRAMS:
    program = folder / name
    program.write_text(
      f"#!{sys.executable}\nimport json, os, sys\n"
      f"with open({str(log)!r}, 'a') as log:\n"
      f"  log.write(json.dumps([{name!r}, *sys.argv[1:]]) + '\\n')\n"
      f"print(os.environ.get('SAY_' + {name!r}, {SAY.get(name, 'ACTIVE')!r}))\n"
      f"sys.exit(int(os.environ.get('EXIT_' + {name!r}, 0)))\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
  environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
  environment |= {"HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
  read = lambda: [json.loads(line) for line in log.read_text().splitlines()]  # noqa: E731
  return environment, read


def launch(script, *arguments, environment=None):
  command = ["bash", script, *OPTIONS.get(script, ()), *map(str, arguments)]
  return subprocess.run(
    command, cwd=ROOT, env=environment, capture_output=True, text=True
  )


def printed(result):
  """The commands a launcher printed, each as a shell reads it."""
  assert result.returncode == 0, result.stderr
  return [
    shlex.split(line.replace("$'", "'").replace("\\n", " "))
    for line in result.stdout.splitlines()
  ]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_prints_every_command_and_runs_none(script, calls):
  environment, called = calls
  arguments = [*CONFIG, "--workdir", "gs://bucket/runs/hate"]
  dry = launch(script, "--dry_run", *arguments, environment=environment)
  commands = printed(dry)
  assert called() == []
  text = " ".join(commands[-1])
  assert "python -m safetydpo_jax.train --config configs/hate.py:sd15" in text

  launch(script, *arguments, environment=environment)
  ran = [call for call in called() if call[0] in ("gcloud", "xpk", "docker", "srun")]
  said = [line for line in commands if line[0] in ("gcloud", "xpk", "docker", "srun")]
  assert [call[:4] for call in ran] == [line[:4] for line in said]


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_takes_the_same_arguments_and_says_what_is_missing(script, tmp_path):
  assert "example:" in launch(script, "--help").stdout
  for arguments, message in (
    ([], "train needs its arguments"),
    (["--workdir", "runs/hate"], "train needs --config"),
    (["hats", *CONFIG], "there is no safetydpo_jax/hats.py"),
  ):
    result = launch(script, "--dry_run", *arguments)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
  result = launch(script, "--dry_run", "encode", "--pairs", "P", "--out", "C")
  assert "python -m safetydpo_jax.encode --pairs P --out C" in result.stdout.replace(
    "\\", ""
  )


def test_every_argument_arrives_as_it_was_given_on_this_machine(calls):
  environment, called = calls
  arguments = [*CONFIG, "--workdir", NASTY, "--config.model", "", f"--x={NASTY}"]
  assert launch("launch/gpu.sh", *arguments, environment=environment).returncode == 0
  assert called() == [["python", "-m", "safetydpo_jax.train", *arguments]]


def test_every_argument_arrives_as_it_was_given_under_srun(calls):
  environment, called = calls
  arguments = [*CONFIG, "--workdir", NASTY]
  launch("launch/slurm.sbatch", *arguments, environment=environment)
  assert called()[0][-6:] == ["-m", "safetydpo_jax.train", *arguments]
  assert not [word for word in called()[0] if word.startswith("--cpus")]


def test_tasks_get_the_processors_that_the_job_has(calls):
  environment, called = calls
  environment["SLURM_CPUS_PER_TASK"] = "8"
  launch("launch/slurm.sbatch", *CONFIG, environment=environment)
  assert "--cpus-per-task=8" in called()[0]


@pytest.mark.parametrize("script", ["launch/tpu_vm.sh", "launch/gke_xpk.sh"])
def test_every_argument_arrives_as_it_was_given_on_a_host(script, calls, tmp_path):
  """The last command is a line for another shell; one runs it here."""
  environment, called = calls
  arguments = [*CONFIG, "--workdir", NASTY]
  launch(script, "--do", "run", *arguments, environment=environment)
  (line,) = [call[call.index("--command") + 1] for call in called()]
  (tmp_path / "checkout").mkdir()
  (tmp_path / "environment/bin").mkdir(parents=True)
  shutil.copy(tmp_path / "bin/python", tmp_path / "environment/bin/python")
  line = line.replace("cd /app", "cd checkout")
  subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, check=True)
  assert called()[-1] == ["python", "-m", "safetydpo_jax.train", *arguments]


def test_gkes_shell_becomes_the_run(calls):
  """xpk sends SIGTERM to that shell; the run would end with it, and save nothing."""
  environment, called = calls
  launch("launch/gke_xpk.sh", "--do", "run", *CONFIG, environment=environment)
  (line,) = [call[call.index("--command") + 1] for call in called()]
  assert line.startswith("cd /app && exec env ")


@pytest.mark.parametrize("script", ["launch/tpu_vm.sh", "launch/gke_xpk.sh"])
def test_buckets_are_mounted_and_read_through_the_mount(script, calls):
  environment, called = calls
  launch(
    script,
    *("merge", "--experts", "gs://b-1/x,gs://b-1/y", "--out", "gs://b-2/z"),
    environment=environment,
  )
  lines = [" ".join(call) for call in called()]
  assert [line for line in lines if "gcsfuse" in line and "/mnt/gcs/b-1" in line]
  assert [line for line in lines if "gcsfuse" in line and "b-2" in line]
  for line in lines:
    if "gcsfuse --implicit" in line or "storage attach" in line:
      assert "metadata-cache-ttl-secs" in line
      assert "rename-dir-limit" in line
  assert "--experts /mnt/gcs/b-1/x\\,/mnt/gcs/b-1/y --out /mnt/gcs/b-2/z" in lines[-1]
  assert "JAX_COMPILATION_CACHE_DIR=/mnt/gcs/b-1/jax-cache" in lines[-1]


@pytest.mark.parametrize(
  ("status", "state", "again"),
  [
    (0, "COMPLETING", False),
    (1, "RUNNING", False),
    (143, "RUNNING", True),
    (143, "COMPLETING", False),  # by scancel
    (143, "CANCELLED", False),
  ],
)
def test_slurm_runs_a_job_again_that_was_told_to_stop(status, state, again, calls):
  environment, called = calls
  environment |= {"EXIT_srun": str(status), "SLURM_JOB_ID": "7"}
  environment["SAY_scontrol"] = f"JobId=7 UserId=x\n   JobState={state} Reason=None"
  result = launch("launch/slurm.sbatch", *CONFIG, environment=environment)
  assert result.returncode == status
  assert (["scontrol", "requeue", "7"] in called()) == again


def test_a_token_stays_out_of_command_lines(calls):
  environment, called = calls
  environment["HF_TOKEN"] = "hf_secret"
  launch("launch/gpu.sh", "--image", "i", *CONFIG, environment=environment)
  assert [call for call in called() if "HF_TOKEN" in call]
  assert "hf_secret" not in str(called())


def test_a_slice_is_given_back_by_one_step(calls):
  environment, called = calls
  result = launch("launch/tpu_vm.sh", "--do", "delete", environment=environment)
  assert result.returncode == 0, result.stderr
  (call,) = called()
  assert call[3:6] == ["queued-resources", "delete", "safetydpo"]


@pytest.mark.parametrize("spelling", ["--dry-run", "--dryrun"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_in_other_spelling_runs_nothing(script, spelling, calls):
  environment, called = calls
  more = OPTIONS.get(script, [])
  result = launch(script, spelling, *more, *CONFIG, environment=environment)
  assert result.returncode == 1
  assert f"{spelling} is no option; they are written with _" in result.stderr
  assert called() == []


def test_a_slice_that_nothing_is_known_of_is_not_waited_for(calls):
  environment, _ = calls
  environment["WAIT_SECONDS"] = "0"
  gcloud = pathlib.Path(environment["PATH"].split(":")[0], "gcloud")
  recording = gcloud.read_text()
  gcloud.write_text('#!/bin/sh\ncase "$*" in *describe*) exit 1; esac\n')
  result = launch("launch/tpu_vm.sh", "--do", "create", environment=environment)
  assert "error: gcloud says nothing of safetydpo" in result.stderr
  gcloud.write_text(recording)
  environment["SAY_gcloud"] = "SUSPENDED"
  result = launch("launch/tpu_vm.sh", "--do", "create", environment=environment)
  assert "is SUSPENDED: delete it" in result.stderr


def test_an_unknown_step_is_named():
  result = launch("launch/tpu_vm.sh", "--do", "fly", *CONFIG)
  assert "--do has fly" in result.stderr


def test_the_page_on_the_first_pod_run_says_what_works(calls):
  """Its blocks in their order, with a bucket and against the stand-ins."""
  environment, called = calls
  page = (ROOT / "docs/first_pod_run.md").read_text()
  blocks = re.findall(r"^```bash\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
  script = "set -e\n" + "".join(blocks).replace("BUCKET", "bucket")
  command = ["bash", "-c", script]
  result = subprocess.run(
    command, cwd=ROOT, env=environment, capture_output=True, text=True
  )
  assert result.returncode == 0, result.stderr
  remote = [
    shlex.split(call[-1]) for call in called() if "-m safetydpo_jax" in call[-1]
  ]
  local = [call for call in called() if call[0] == "python"]
  asked = [line[line.index("-m") + 1 :] for line in [*remote, *local]]
  names = [line[0].removeprefix("safetydpo_jax.") for line in asked]
  there = ["encode", *["train"] * 7, "merge", "generate", "generate"]
  assert names == [*there, "evaluate", "export"]
  for name, line in zip(names, asked):
    documents.parse(name, line[1:])
  categories = [train.parse(line[1:])[0].category for line in asked[1:8]]
  assert sorted(categories) == sorted(CATEGORIES)


@pytest.mark.skipif(
  not shutil.which("shellcheck"), reason="shellcheck is not installed"
)
def test_shellcheck_finds_nothing():
  files = sorted(map(str, (ROOT / "launch").glob("*.s*")))
  result = subprocess.run(
    ["shellcheck", "-x", *files], cwd=ROOT, capture_output=True, text=True
  )
  assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("kind", ["tpu", "cuda"])
def test_a_container_takes_files_that_are_there_and_nothing_else(kind):
  lines = (ROOT / f"launch/Dockerfile.{kind}").read_text().splitlines()
  copied = [
    file for line in lines if line.startswith("COPY ") for file in line.split()[1:-1]
  ]
  let_in = (ROOT / f"launch/Dockerfile.{kind}.dockerignore").read_text().splitlines()
  assert let_in[0] == "*"
  assert {f"!{file}" for file in copied} == {x for x in let_in if x.startswith("!")}
  assert all((ROOT / file).exists() for file in copied)
  assert any("jax[" + kind in line for line in lines)
  assert "USER user" in lines
