"""Concepts → pairs of prompts, by a language model: `python -m safetydpo_jax.prompts`.

Asks an OpenAI-compatible host (`data/writing/endpoint.py`) for pairs of each concept,
round by round until there are --per_concept of each. Every accepted answer is saved in
OUT.jsonl as it arrives (`data/writing/answers.py`), and the same command goes on from
there: what was answered is not asked again. The CSV (`data/writing/prompt_pairs.py`) is
a function of that file. It is written at the end, when the numbers of pairs no longer
change, with OUT.json beside it, which says what made it.

Pairs are counted so that

  asked = accepted + duplicates + invalid + failed + unused

where invalid are those missing from an answer or of wrong form, failed those of
requests without a valid answer in this run, unused those beyond --per_concept.
"""

import argparse
import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from safetydpo_jax.data.writing.answers import (
  Answer,
  AnswerFile,
  Place,
  Selection,
  open_answers,
  plan_round,
  select_pairs,
)
from safetydpo_jax.data.writing.endpoint import Endpoint, RequestFailed
from safetydpo_jax.data.writing.prompt_pairs import (
  FORMATS,
  Concept,
  Template,
  make_messages,
  parse_answer,
  read_concepts,
  read_template,
  write_pair_prompts,
)
from safetydpo_jax.errors import InputError, run_command
from safetydpo_jax.runtime import manifest

EXAMPLE = """example:
  python -m safetydpo_jax.prompts --concepts concepts.csv \\
    --endpoint http://localhost:8000/v1 --model NAME --out pairs/prompts.csv
"""
# What decides an answer, or what is asked for; must be equal when a run goes on.
_SETTINGS = ("model", "temperature", "seed", "max_tokens", "per_concept", "per_request")
_HOPELESS = 16  # failed requests in a row, or twice those in flight


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
  """The command line.

  Raises:
    InputError: a number is out of range.
  """
  parser = argparse.ArgumentParser(
    prog="python -m safetydpo_jax.prompts",
    description="Has a language model write pairs of unsafe and safe prompts.",
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--concepts", required=True, type=Path, help="CSV with concept and category")
  add("--endpoint", required=True, help="OpenAI-compatible host, as far as /v1")
  add("--model", required=True, help="the model's name there")
  add("--out", required=True, type=Path, metavar="CSV", help="the pairs of prompts")
  add("--per_concept", type=int, default=20, help="pairs (default: 20)")
  add("--per_request", type=int, default=10, help="pairs at a time (default: 10)")
  add("--rounds", type=int, default=4, help="of asking for the missing (default: 4)")
  add("--batch", type=int, default=8, help="requests at a time (default: 8)")
  add("--temperature", type=float, default=1.0, help="of the model (default: 1.0)")
  add("--max_tokens", type=int, default=4096, help="of an answer; 0: not sent")
  add("--seed", type=int, default=0, help="of the model's draws (default: 0)")
  add("--evaluation_seed", type=int, default=0, help="of the first pair's noise")
  add("--template", type=Path, metavar="FILE", help="other texts, see templates/")
  add(
    "--response_format",
    default="json_schema",
    choices=tuple(FORMATS),
    help="the strictest to try (default: json_schema)",
  )
  add("--api_key_env", metavar="NAME", help="environment variable that holds the key")
  add("--timeout", type=float, default=120.0, help="seconds for a reply (default: 120)")
  add("--attempts", type=int, default=6, help="at one request (default: 6)")
  add("--allow_fewer", action="store_true", help="take what there is")
  add("--dry_run", action="store_true", help="show the first request, send nothing")
  options = parser.parse_args(arguments)
  for name in ("per_concept", "per_request", "rounds", "batch", "attempts"):
    if getattr(options, name) < 1:
      raise InputError(f"--{name} is {getattr(options, name)}; expected 1 or more")
  for name in ("temperature", "max_tokens", "seed", "evaluation_seed"):
    value = getattr(options, name)
    if not 0 <= value < 2**63:  # also nan
      raise InputError(f"--{name} is {value}; expected 0 or more, below 2^63")
  if not 0 < options.timeout <= 86_400:
    raise InputError(f"--timeout is {options.timeout}; expected 0 to 86400 seconds")
  if options.out.suffix != ".csv":
    raise InputError(f"--out is {options.out}; expected a name that ends in .csv")
  return options


def make_body(
  options: argparse.Namespace,
  template: Template,
  concept: Concept,
  place: Place,
  count: int,
) -> dict[str, Any]:
  """The fields of one request; its seed is a function of its place."""
  digest = hashlib.sha256(f"{options.seed} {tuple(place)}".encode()).digest()
  body = {
    "model": options.model,
    "messages": make_messages(template, concept, count),
    "temperature": options.temperature,
    "seed": int.from_bytes(digest[:4]) % 2**31,
  }
  return {**body, "max_tokens": options.max_tokens} if options.max_tokens else body


def make_endpoint(options: argparse.Namespace) -> Endpoint:
  """The client; its key comes from the environment."""
  key = None
  if options.api_key_env and not (key := os.environ.get(options.api_key_env)):
    raise InputError(
      f"the environment has no {options.api_key_env}, which --api_key_env names; "
      "export it"
    )
  names = list(FORMATS)
  names = names[names.index(options.response_format) :]
  return Endpoint(
    options.endpoint,
    key=key,
    formats=[FORMATS[name] for name in names],
    timeout=options.timeout,
    attempts=options.attempts,
  )


def ask_all(
  endpoint: Endpoint,
  options: argparse.Namespace,
  template: Template,
  concepts: Sequence[Concept],
  requests: Mapping[Place, int],
  log: AnswerFile,
) -> dict[Place, str]:
  """Sends requests, --batch at a time, and saves each answer as it arrives.

  Returns:
    Why requests failed.

  Raises:
    InputError: no request can succeed, or too many in a row did not.
  """
  failed: dict[Place, str] = {}
  in_a_row = 0
  with (
    tqdm(total=len(requests), unit=" requests", disable=not requests) as progress,
    ThreadPoolExecutor(options.batch) as pool,
  ):
    futures = {}
    for place, count in requests.items():
      body = make_body(options, template, concepts[place.concept], place, count)
      check = partial(parse_answer, count=count)
      futures[pool.submit(endpoint.ask, body, check)] = place
    try:
      for future in as_completed(futures):
        place = futures[future]
        try:
          log.add(place, Answer(requests[place], future.result()))
          in_a_row = 0
        except RequestFailed as error:
          failed[place] = str(error)
          in_a_row += 1
        retries = endpoint.retries.total()
        progress.set_postfix(retries=retries, failed=len(failed), refresh=False)
        progress.update()
        if in_a_row == max(_HOPELESS, 2 * options.batch):
          raise InputError(
            f"{in_a_row} requests in a row failed, the last with {failed[place]!r}; "
            f"what was accepted is in {log.file}, the same command goes on"
          )
    except BaseException:  # also Ctrl-C: do not wait for what is in flight
      pool.shutdown(wait=False, cancel_futures=True)
      endpoint.stop()
      raise
  return failed


def count_pairs(
  answers: Mapping[Place, Answer], selection: Selection, failed: int
) -> dict[str, int]:
  """What became of the pairs that were asked for."""
  asked = sum(answer.count for answer in answers.values())
  return {
    "asked": asked + failed,
    "accepted": sum(map(len, selection.pairs)),
    "duplicates": selection.duplicates,
    "invalid": asked - sum(len(answer.pairs) for answer in answers.values()),
    "failed": failed,
    "unused": selection.unused,
  }


def show_plan(
  options: argparse.Namespace, concepts: Sequence[Concept], template: Template
) -> None:
  """Prints the first request's messages and how many there are."""
  first = plan_round(0, concepts, {}, options.per_concept, options.per_request)
  for message in make_messages(template, concepts[0], next(iter(first.values()))):
    print(f"--- {message['role']}\n{message['content']}")
  print(
    f"---\n{len(concepts)} concepts, {options.per_concept} pairs each: {len(first)} "
    f"requests to {options.model} in the first of at most {options.rounds} rounds, "
    f"{options.batch} at a time; nothing was sent"
  )


def main(arguments: list[str] | None = None) -> None:
  """Reads, asks round by round, selects, writes."""
  options = parse_arguments(arguments)
  concepts, repeated = read_concepts(options.concepts)
  if repeated:
    print(f"{options.concepts}: {repeated} rows repeat a concept and are dropped")
  template = read_template(options.template)
  if options.dry_run:
    show_plan(options, concepts, template)
    return

  settings = {name: getattr(options, name) for name in _SETTINGS}
  for name, content in (("template", template), ("concepts", concepts)):
    settings[f"{name}_sha256"] = hashlib.sha256(repr(content).encode()).hexdigest()
  endpoint = make_endpoint(options)
  per_concept, failed = options.per_concept, 0
  log_file = options.out.with_name(f"{options.out.name}.jsonl")
  with open_answers(log_file, settings, len(concepts)) as log:
    for number in range(options.rounds):
      requests = plan_round(
        number, concepts, log.answers, per_concept, options.per_request
      )
      reasons = ask_all(endpoint, options, template, concepts, requests, log)
      failed += sum(requests[place] for place in reasons)
      for place, reason in reasons.items():
        print(f"failed: {concepts[place.concept].concept}: {reason}")
      if requests and len(reasons) == len(requests):
        break  # nor would those of another round succeed
  selection = select_pairs(concepts, log.answers, per_concept)

  counts = count_pairs(log.answers, selection, failed)
  parts = " + ".join(f"{n} {name}" for name, n in counts.items() if name != "asked")
  print(f"{counts['asked']} pairs asked = {parts}")
  if endpoint.retries:
    reasons = ", ".join(f"{n} {name}" for name, n in sorted(endpoint.retries.items()))
    print(f"requests sent again: {reasons}")
  short = [
    f"{concept} ({category}): {len(mine)} of {per_concept} pairs"
    for (concept, category), mine in zip(concepts, selection.pairs)
    if len(mine) < per_concept
  ]
  for line in short:
    print(f"too few: {line}")
  if not counts["accepted"] or (short and not options.allow_fewer):
    raise InputError(
      f"{len(short)} of {len(concepts)} concepts have fewer than {per_concept} pairs; "
      f"what there is stays in {log_file}: run the same command again, with more "
      "--rounds, or with --allow_fewer to take it"
    )

  pairs = [pair for mine in selection.pairs for pair in mine]
  write_pair_prompts(options.out, pairs, options.evaluation_seed)
  manifest.write_json(
    options.out.with_name(f"{options.out.name}.json"),
    {
      **settings,
      "evaluation_seed": options.evaluation_seed,
      **counts,
      "concepts": len(concepts),
      "short": short,
      "versions": manifest.versions(),
    },
  )
  print(f"{options.out}: {len(pairs)} pairs of {len(concepts)} concepts")


if __name__ == "__main__":
  run_command(main)
