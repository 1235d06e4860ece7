"""JAX's platforms on made-up machines, and what a command prints on this one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from safetydpo_jax.runtime import accelerators
from safetydpo_jax.runtime.accelerators import platforms_without_tpu

GPU = {"dev/nvidia0": ""}
NETWORK = {
  "sys/bus/pci/devices/0000:00:03.0/vendor": "0x1ae0\n",
  "sys/bus/pci/devices/0000:00:03.0/device": "0x0042\n",
}
TPU_V5E = {
  "sys/bus/pci/devices/0000:00:04.0/vendor": "0x1ae0\n",
  "sys/bus/pci/devices/0000:00:04.0/device": "0x0063\n",
}


@pytest.fixture
def machine(tmp_path, monkeypatch):
  """A machine with these files, and these packages installed."""

  def build(devices, *installed):
    monkeypatch.setattr(accelerators, "_is_installed", installed.__contains__)
    for name, text in devices.items():
      file = tmp_path / name
      file.parent.mkdir(parents=True, exist_ok=True)
      file.write_text(text)
    return tmp_path

  return build


@pytest.mark.parametrize(
  ("devices", "installed", "expected"),
  [
    ({}, ["libtpu"], "cpu"),
    (NETWORK, ["libtpu"], "cpu"),
    ({"dev/vfio/vfio": ""}, ["libtpu"], "cpu"),
    (GPU, ["libtpu"], "cpu"),
    (GPU, ["libtpu", "jax_cuda13_plugin"], "cuda,cpu"),
    (GPU, ["libtpu", "jax_cuda12_plugin"], "cuda,cpu"),
    # JAX's own search.
    ({}, [], None),
    (GPU, ["jax_cuda13_plugin"], None),
    ({"dev/kfd": ""}, ["libtpu"], None),
    ({"dev/accel0": ""}, ["libtpu"], None),
    ({"dev/vfio/0": ""}, ["libtpu"], None),
    (NETWORK | TPU_V5E, ["libtpu"], None),
    (GPU | TPU_V5E, ["libtpu", "jax_cuda13_plugin"], None),
  ],
)
def test_libtpu_is_kept_out_only_where_there_is_no_tpu(
  machine, devices, installed, expected
):
  assert platforms_without_tpu({}, machine(devices, *installed)) == expected


@pytest.mark.parametrize("name", accelerators.TPU_VARIABLES)
def test_a_variable_of_a_tpu_leaves_jax_alone(machine, name):
  assert platforms_without_tpu({name: "0"}, machine({}, "libtpu")) is None


def test_what_jax_sets_without_a_tpu_is_not_a_sign_of_one(machine):
  assert platforms_without_tpu({"TPU_SKIP_MDS_QUERY": "1"}, machine({}, "libtpu"))


@pytest.mark.parametrize("given", ["tpu", "cpu", "cuda", "tpu,cpu"])
def test_the_users_platforms_stay(machine, given):
  assert platforms_without_tpu({"JAX_PLATFORMS": given}, machine({}, "libtpu")) is None


@pytest.mark.parametrize("value", ["", "-1"])
def test_hidden_gpus_are_not_asked_for(machine, value):
  root = machine(GPU, "libtpu", "jax_cuda13_plugin")
  assert platforms_without_tpu({"CUDA_VISIBLE_DEVICES": value}, root) == "cpu"
  assert platforms_without_tpu({"CUDA_VISIBLE_DEVICES": "0"}, root) == "cuda,cpu"


QUIET = """
import sys
{first}
import safetydpo_jax
{second}
import jax
print(jax.devices()[0].platform, jax.config.jax_platforms)
maps = open("/proc/self/maps").read() if sys.platform == "linux" else ""
print("libtpu" in maps)
"""


def run(*words, **variables):
  """A process in which no variable decides about platforms or logs."""
  drop = ("JAX_PLATFORMS", "TF_CPP_MIN_LOG_LEVEL", *accelerators.TPU_VARIABLES)
  environment = {k: v for k, v in os.environ.items() if k not in drop}
  return subprocess.run(
    [sys.executable, *words],
    env=environment | {"HF_HUB_OFFLINE": "1"} | variables,
    capture_output=True,
    text=True,
    timeout=300,
  )


@pytest.fixture
def without_tpu():
  if accelerators._has_tpu({}, Path("/")) or any(
    Path("/", device).exists() for device in accelerators.NVIDIA
  ):
    pytest.skip("this machine has an accelerator")


@pytest.mark.parametrize("first", ["", "import jax"])
def test_the_first_use_of_jax_is_quiet(without_tpu, first):
  done = run("-c", QUIET.format(first=first, second=""))
  assert done.returncode == 0
  assert done.stderr == ""
  platform, *_ = done.stdout.split()
  assert platform == "cpu"
  assert done.stdout.splitlines()[1] == "False"


def test_a_choice_made_in_python_stays(without_tpu):
  first = "import jax; jax.config.update('jax_platforms', 'cpu,cpu')"
  done = run("-c", QUIET.format(first=first, second=""))
  assert done.stdout.splitlines()[0] == "cpu cpu,cpu"


def test_a_command_prints_only_its_own_lines(without_tpu, tmp_path):
  prompts = tmp_path / "prompts.csv"
  prompts.write_text("prompt,seed\na red circle,1\n")
  done = run(
    *["-m", "safetydpo_jax", "generate", "--model", "toy", "--prompts", str(prompts)],
    *["--out", str(tmp_path / "images"), "--steps", "1"],
  )
  assert done.returncode == 0, done.stderr
  assert "TPU" not in done.stderr.upper()
  # The progress bar is the command's own.
  lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line]
  assert all(re.fullmatch(r" *\d+%\|.*\|.*\]", line) for line in lines), lines


def test_plan_still_finds_the_compiler(without_tpu):
  pytest.importorskip("libtpu", reason="the TPU compiler is not installed")
  done = run(
    "-c",
    "from safetydpo_jax.planning import chips\n"
    "found = chips.tpu_devices(chips.read_topology('v5e:2x2'))\n"
    "print(len(found))",
  )
  assert done.stdout.split()[-1:] == ["4"], done.stderr
