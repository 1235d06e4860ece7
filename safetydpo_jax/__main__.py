"""Every command by its name: `safetydpo COMMAND …`.

A command is the module of the same name: `safetydpo generate …`,
`python -m safetydpo_jax generate …` and `python -m safetydpo_jax.generate …` do the
same. Modules are imported by name, and only the one that is asked for, so `--help`
answers at once.
"""

import difflib
import importlib
import sys

import safetydpo_jax
from safetydpo_jax.errors import InputError, run_command

COMMANDS = {
  "prompts": "concepts to pairs of prompts, written by a language model",
  "encode": "images and prompts to a pair cache",
  "train": "train one safety expert",
  "merge": "merge experts into one LoRA",
  "generate": "render a CSV of prompts",
  "evaluate": "measure images and write a report",
  "export": "a LoRA for diffusers, A1111 and ComfyUI",
  "plan": "whether a run fits a TPU slice or GPUs, and its speed",
  "toyworld.demo": "the whole method in the toy world, with its report",
  "toyworld.prompts": "prompts of the toy world as CSV files",
  "toyworld.measure": "what pictures of toy prompts show",
  "toyworld.report": "the demo's report, from its figures",
  "toyworld.seeds": "the demo with several seeds",
  "toyworld.study": "compare the merging methods in the toy world",
  "toyworld.attack": "attack aligned models with optimized prompts",
  "toyworld.pretrain": "make the toy Stable Diffusion",
}
SHORT = {"demo": "toyworld.demo"}


def main(arguments: list[str] | None = None) -> None:
  """Runs the command that the first word names.

  Raises:
    InputError: there is no such command.
  """
  words = sys.argv[1:] if arguments is None else list(map(str, arguments))
  name, rest = (words[0], words[1:]) if words else ("--help", [])
  if name in ("-h", "--help"):
    print(_help())
    return
  if name == "--version":
    print(f"safetydpo {safetydpo_jax.__version__}")
    return
  command = SHORT.get(name, name)
  if command not in COMMANDS:
    raise InputError(_unknown(name))
  importlib.import_module(f"safetydpo_jax.{command}").main(rest)


def console_script() -> None:
  """`safetydpo`: a wrong input is one line, and the exit code is 1."""
  run_command(main)


def _help() -> str:
  width = max(map(len, COMMANDS))
  lines = [f"  {name:{width}}  {about}" for name, about in COMMANDS.items()]
  short = ", ".join(f"{key} is short for {value}" for key, value in SHORT.items())
  return "\n".join(
    [
      "usage: safetydpo COMMAND …  |  --help  |  --version",
      "",
      "Safety experts for Stable Diffusion, trained with DPO.",
      "",
      *lines,
      "",
      f"{short}.",
      "The options of a command: safetydpo COMMAND --help",
    ]
  )


def _unknown(name: str) -> str:
  if name.startswith("-"):
    return f"{name} has no command before it; expected safetydpo COMMAND {name} …"
  # What follows the dot counts too: "study" is nearest to toyworld.study.
  names = {full.rpartition(".")[2]: full for full in reversed(COMMANDS)}
  names |= {full: full for full in (*COMMANDS, *SHORT)}
  near = difflib.get_close_matches(name, names, n=1, cutoff=0)[0]
  return (
    f"there is no command {name!r}; the nearest is {names[near]}, and "
    "`safetydpo --help` lists them all"
  )


if __name__ == "__main__":
  console_script()
