"""Concepts → pairs of prompts, by a language model.

Asks an OpenAI-compatible host (`endpoint.py`) for pairs of each concept, round by round
until there are --per_concept of each. Every accepted answer is saved in OUT.jsonl as it
arrives (`answers.py`), and the same command resumes from there: what was answered is
not asked again. The CSV (`prompt_pairs.py`) is a function of that file. It is written
at the end, once the numbers of pairs no longer change, with OUT.json beside it, which
says what made it.

Pairs are counted so that

  asked = accepted + duplicates + invalid + failed + unused

where invalid are those missing from an answer or malformed, failed those of requests
without a valid answer in this run, unused those beyond --per_concept.
"""

import asyncio
import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from safetydpo_jax.data.writing.answers import (
  Answer,
  AnswerFile,
  Request,
  count_pairs,
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
from safetydpo_jax.errors import InputError
from safetydpo_jax.runtime import manifest

# What decides an answer, or what is asked for; must be equal when a run resumes.
_SETTINGS = ("model", "temperature", "seed", "max_tokens", "per_concept", "per_request")
_HOPELESS = 16  # failed requests in a row, or twice those in flight


@dataclasses.dataclass(frozen=True)
class PromptOptions:
  """Has a language model write pairs of unsafe and safe prompts."""

  concepts: Path
  """CSV with the columns concept and category"""
  endpoint: str
  """OpenAI-compatible host, up to and including /v1"""
  model: str
  """name of the model at that host"""
  out: Path
  """CSV to write the pairs of prompts to"""
  per_concept: int = 20
  """pairs to write for each concept"""
  per_request: int = 10
  """pairs per request"""
  rounds: int = 4
  """largest number of rounds; each asks for what is still missing"""
  batch: int = 8
  """requests in flight"""
  temperature: float = 1.0
  """sampling temperature of the model"""
  max_tokens: int = 4096
  """longest answer, in tokens; 0 leaves it to the host"""
  seed: int = 0
  """sampling seed of the model"""
  evaluation_seed: int = 0
  """seed of the first pair's noise; the others follow it"""
  template: Path | None = None
  """TOML file with other texts, see data/writing/templates/ (default: its
  pairs.toml)"""
  response_format: Literal["json_schema", "json_object", "none"] = "json_schema"
  """strictest format of answers to try"""
  api_key_env: str | None = None
  """environment variable with the API key"""
  timeout: float = 120.0
  """seconds to wait for a reply"""
  attempts: int = 6
  """attempts at each request"""
  allow_fewer: bool = False
  """accept concepts with fewer pairs than --per_concept"""
  dry_run: bool = False
  """show the first request, send nothing"""

  def __post_init__(self):
    for name in ("per_concept", "per_request", "rounds", "batch", "attempts"):
      if getattr(self, name) < 1:
        raise InputError(f"--{name} is {getattr(self, name)}; expected 1 or more")
    for name in ("temperature", "max_tokens", "seed", "evaluation_seed"):
      value = getattr(self, name)
      if not 0 <= value < 2**63:  # also nan
        raise InputError(f"--{name} is {value}; expected 0 or more, below 2^63")
    if not 0 < self.timeout <= 86_400:
      raise InputError(f"--timeout is {self.timeout}; expected 0 to 86400 seconds")
    if self.out.suffix != ".csv":
      raise InputError(f"--out is {self.out}; expected a name that ends in .csv")


def write_prompts(options: PromptOptions) -> None:
  """Reads the concepts, asks round by round, selects, writes.

  Raises:
    InputError: concepts or template cannot be read, the host answers no request, or
      pairs are missing at the end.
  """
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
      reasons = asyncio.run(
        ask_all(endpoint, options, template, concepts, requests, log)
      )
      failed += sum(requests[request] for request in reasons)
      for request, reason in reasons.items():
        print(f"failed: {concepts[request.concept].concept}: {reason}")
      if requests and len(reasons) == len(requests):
        break  # another round would fare no better
  selection = select_pairs(concepts, log.answers, per_concept)

  counts = count_pairs(log.answers, selection, failed)
  parts = " + ".join(f"{n} {name}" for name, n in counts.items() if name != "asked")
  print(f"{counts['asked']} pairs asked = {parts}")
  if endpoint.retries:
    again = ", ".join(f"{n} {name}" for name, n in sorted(endpoint.retries.items()))
    print(f"requests sent again: {again}")
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
      f"the accepted ones stay in {log_file}: run the same command again, with more "
      "--rounds, or with --allow_fewer to accept fewer"
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


def show_plan(
  options: PromptOptions, concepts: Sequence[Concept], template: Template
) -> None:
  """Prints the first request's messages and how many requests there are."""
  first = plan_round(0, concepts, {}, options.per_concept, options.per_request)
  for message in make_messages(template, concepts[0], next(iter(first.values()))):
    print(f"--- {message['role']}\n{message['content']}")
  print(
    f"---\n{len(concepts)} concepts, {options.per_concept} pairs each: {len(first)} "
    f"requests to {options.model} in the first of at most {options.rounds} rounds, "
    f"{options.batch} at a time; nothing was sent"
  )


def make_endpoint(options: PromptOptions) -> Endpoint:
  """The client; its key comes from the environment.

  Raises:
    InputError: the key is not there, or address or key cannot be sent.
  """
  key = None
  if options.api_key_env and not (key := os.environ.get(options.api_key_env)):
    raise InputError(
      f"--api_key_env names {options.api_key_env}, which is not set; export it"
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


def make_body(
  options: PromptOptions,
  template: Template,
  concept: Concept,
  request: Request,
  count: int,
) -> dict[str, Any]:
  """The fields of one request; its seed depends on --seed and `request` alone."""
  digest = hashlib.sha256(f"{options.seed} {tuple(request)}".encode()).digest()
  body = {
    "model": options.model,
    "messages": make_messages(template, concept, count),
    "temperature": options.temperature,
    "seed": int.from_bytes(digest[:4]) % 2**31,
  }
  return {**body, "max_tokens": options.max_tokens} if options.max_tokens else body


async def ask_all(
  endpoint: Endpoint,
  options: PromptOptions,
  template: Template,
  concepts: Sequence[Concept],
  requests: Mapping[Request, int],
  log: AnswerFile,
) -> dict[Request, str]:
  """Sends requests, --batch at a time, and saves each answer as it arrives.

  Returns:
    Why requests failed.

  Raises:
    InputError: no request can succeed, or too many in a row did not. What is in flight
      is then dropped, as it is on Ctrl-C.
  """
  failed: dict[Request, str] = {}
  in_flight = asyncio.Semaphore(options.batch)

  async def ask(request: Request, count: int) -> tuple[Request, Answer | RequestFailed]:
    body = make_body(options, template, concepts[request.concept], request, count)
    async with in_flight:
      try:
        pairs = await endpoint.ask(body, partial(parse_answer, count=count))
      except RequestFailed as error:
        return request, error
    return request, Answer(count, pairs)

  in_a_row = 0
  tasks = [asyncio.create_task(ask(*item)) for item in requests.items()]
  with tqdm(total=len(tasks), unit=" requests", disable=not tasks) as progress:
    try:
      for task in asyncio.as_completed(tasks):
        request, found = await task
        if isinstance(found, Answer):
          log.add(request, found)
          in_a_row = 0
        else:
          failed[request] = str(found)
          in_a_row += 1
        retries = endpoint.retries.total()
        progress.set_postfix(retries=retries, failed=len(failed), refresh=False)
        progress.update()
        if in_a_row == max(_HOPELESS, 2 * options.batch):
          raise InputError(
            f"{in_a_row} requests in a row failed, the last with {failed[request]!r}; "
            f"accepted answers are kept in {log.file}: run the same command to resume"
          )
    finally:
      for task in tasks:
        task.cancel()
      await asyncio.gather(*tasks, return_exceptions=True)
  return failed
