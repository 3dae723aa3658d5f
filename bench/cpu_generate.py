"""Speed of SmolLM2 on this CPU: Atom-JAX in several forms, llama.cpp and transformers, side by side.

    python -m bench.cpu_generate W4A4KV4 [W8A8]
    python -m bench.cpu_report          # writes the tables

W4A4KV4 and W8A8 are conversions of SmolLM2 (``atom-jax demo`` makes the first). Each system is a process of
its own (``bench.cpu``). They take turns within each round, on the same cores, so that other load on the
machine meets all of them. A time is that of the fastest round, because other load can only make it longer.
The times of all rounds are saved, after each of them. Decoding is (time of MANY tokens - time of FEW) /
(MANY - FEW), so that the time of prefill is not in it. Prefill is the time to the first token.

llama.cpp comes from npm, with its own binary; without node it is left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from atom_jax.checkpoint import read_config
from bench import record
from bench.cpu import limits, llama_cpp
from bench.cpu.protocol import Prompts, RunningSystem, System
from convert.demo.smollm2 import smollm2_gguf

DECODE_PROMPT = 32
# Above the smallest bucket of new tokens (16), so that FEW and FEW + N <= 64 run the same compiled program.
FEW, MANY = 17, 64


@dataclasses.dataclass(frozen=True)
class Measure:
    """What each system does in a round.

    Attributes:
      counts: numbers of new tokens; two in decoding, whose difference counts.
    """

    kind: str
    batch: int
    prompt_tokens: int
    counts: tuple[int, ...]

    def prompts(self) -> Prompts:
        """Random tokens, the same for all systems."""
        rng = np.random.default_rng(self.prompt_tokens)
        return rng.integers(100, 40_000, (self.batch, self.prompt_tokens)).tolist()

    def tokens(self) -> int:
        """Of one unit of time: those of a decode step, or of the prompt."""
        return self.batch if self.kind == "decode" else self.prompt_tokens

    def seconds(self, times: dict[int, list[float]]) -> float:
        """Of a decode step, or of the prompt: from the fastest round of each number of new tokens."""
        fastest = [min(times[count]) for count in self.counts]
        return fastest[0] if self.kind == "prefill" else (fastest[1] - fastest[0]) / (MANY - FEW)


MEASURES = (
    Measure("decode", 1, DECODE_PROMPT, (FEW, MANY)),
    Measure("decode", 16, DECODE_PROMPT, (FEW, MANY)),
    Measure("prefill", 1, 512, (1,)),
    Measure("prefill", 1, 2000, (1,)),
)


def systems(w4a4kv4: Path, w8a8: Path | None, cores: int) -> list[System]:
    """What is there to be measured on this machine."""
    for scheme, path in (("w4a4kv4", w4a4kv4), ("w8a8", w8a8)):
        if path is not None and (found := read_config(path).format.scheme) != scheme:
            raise SystemExit(f"{path} is {found}, {scheme} is expected")

    def worker(name: str, *words: object, cores: int = cores, frequent: bool = True) -> System:
        command = (sys.executable, "-m", "bench.cpu.worker", *map(str, words))
        return System(name, command, cores, frequent)

    found = [worker("Atom-JAX w4a4kv4", "native", w4a4kv4)]
    if cores > 1:
        found.append(worker("Atom-JAX w4a4kv4, 1 core", "native", w4a4kv4, cores=1))
    if w8a8 is not None:
        found.append(worker("Atom-JAX w8a8", "native", w8a8))
    found += [
        worker("Atom-JAX float", "float", frequent=False),
        worker("Atom-JAX w4a4kv4, reference", "reference", w4a4kv4, frequent=False),
        worker("transformers float32", "transformers", frequent=False),
    ]
    folder = llama_cpp.install()
    if isinstance(folder, str):
        print(f"without llama.cpp: {folder}", flush=True)
        return found
    gguf = smollm2_gguf()
    return found + [llama_cpp.system(folder, model, cores) for model in (gguf, llama_cpp.q4_0(gguf))]


# What each system answered for each measure, by number of new tokens and round: "seconds", "cpu_seconds".
Answers = dict[tuple[str, Measure], dict[int, list[dict[str, float]]]]


def take_turns(running: dict[System, RunningSystem], number: int, answers: Answers) -> None:
    """Lets all systems do one thing after the other.

    Args:
      running: the processes.
      number: of the round: systems that are not frequent rest in the odd ones.
      answers: those of the rounds before; gets those of this one.
    """
    for measure in MEASURES:
        prompts = measure.prompts()
        for count in measure.counts:
            for system, process in running.items():
                if system.frequent or number % 2 == 0:
                    counts = answers.setdefault((system.name, measure), {})
                    counts.setdefault(count, []).append(process.generate(prompts, count))


def shares(row: dict[str, Any], ready: dict[str, Any], limits: dict[str, Any]) -> dict[str, float]:
    """How near to the limits of the CPU an Atom-JAX with native kernels comes; nothing for other systems.

    Returns:
      "of_read": bytes of the parameters that a step reads, over those that memory could deliver meanwhile.
      "of_dot": multiplications of weights, over those that the CPU could do meanwhile. Attention is not
      counted, nor, in prefill, the head, which only sees the last token.
    """
    if ready.get("runs") != "native":
        return {}
    products = ready["products_of_a_token"]
    found = {}
    if row["kind"] == "decode":
        found["of_read"] = ready["bytes_of_a_step"] / row["seconds"] / limits["read_bytes_per_second"]
    if limits["dot_ops_per_second"] is not None:
        counted = products["layers"] + (products["head"] if row["kind"] == "decode" else 0)
        found["of_dot"] = 2 * counted * row["tokens_per_second"] / limits["dot_ops_per_second"]
    return found


def rows(answers: Answers, ready: dict[str, Any], limits: dict[str, Any]) -> list[dict[str, Any]]:
    """The result of each system and measure."""
    found = []
    for (name, measure), rounds in answers.items():
        times = {count: [each["seconds"] for each in of_rounds] for count, of_rounds in rounds.items()}
        seconds = measure.seconds(times)
        fastest = min(rounds[measure.counts[-1]], key=lambda each: each["seconds"])
        row: dict[str, Any] = {"system": name} | dataclasses.asdict(measure)
        row |= {"seconds": seconds, "tokens_per_second": measure.tokens() / seconds}
        row["cores_used"] = fastest["cpu_seconds"] / fastest["seconds"]
        found.append(row | shares(row, ready[name], limits) | {"seconds_of_rounds": times})
    return found


def main(
    w4a4kv4: Annotated[Path, typer.Argument(help="A converted SmolLM2.")],
    w8a8: Annotated[Path | None, typer.Argument(help="Another.")] = None,
    rounds: int = 6,
    seconds: Annotated[float, typer.Option(help="After this no round begins.")] = 360.0,
) -> None:
    """Measures, prints and saves bench/results/cpu_generate.json."""
    began = time.monotonic()
    where = record.environment()
    cores = where["cores"]
    with contextlib.ExitStack() as stack:
        running = {}
        for system in systems(w4a4kv4, w8a8, cores):
            process = running[system] = stack.enter_context(RunningSystem(system))
            for measure in MEASURES:  # compiles, and allocates all memory
                process.generate(measure.prompts(), measure.counts[0])
            print(f"{time.monotonic() - began:4.0f} s  {system.name} is ready", flush=True)
        ready = {system.name: {"cores": system.cores} | process.ready for system, process in running.items()}
        results = {"systems": ready, "limits": limits.measure(), "seconds_of_rounds": [], "rows": []}
        answers: Answers = {}
        for number in range(rounds):
            started = time.monotonic()
            if number and started > began + seconds:
                break
            take_turns(running, number, answers)
            results["limits"] = limits.larger(results["limits"], limits.measure())
            results["seconds_of_rounds"].append(time.monotonic() - started)
            results["rows"] = rows(answers, ready, results["limits"])
            path = record.save("cpu_generate", where, results)
            print(f"{time.monotonic() - began:4.0f} s  round {number + 1} is in {path.name}", flush=True)
    for row in results["rows"]:
        what = f"{row['kind']:7s} {row['batch']:2d} x {row['prompt_tokens']:4d}"
        speed = f"{row['tokens_per_second']:8.1f} tokens/s, {row['cores_used']:.2f} cores used"
        print(f"{row['system']:28s} {what} {speed}")
    if any(row["seconds"] <= 0 for row in results["rows"]):
        raise SystemExit("64 tokens took less time than 17: other load is too high for so few rounds")


if __name__ == "__main__":
    typer.run(main)
