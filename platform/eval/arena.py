"""The pictures of an evaluation as entrants of the arena."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from lorafleet.core.arena.records import Entrant
from lorafleet.eval.results import Results
from lorafleet.eval.run import Run
from lorafleet.eval.systems import adapters_of

VERSION_DIGITS: Final = 12


def entrants_of(run: Run, results: Results | None = None) -> Iterator[Entrant]:
    """Every picture of the run. Its CLIP score is its prompt's in the results, a mean over the prompt's seeds.

    Ready pictures have no seed: they take that of the drawn ones of their prompt with the same number, so that they
    pair up. Adapters of the registry are called NAME@VERSION, as live pairs call them.
    """
    seeds = {
        (each.prompt, each.index): each.seed
        for pictures in run.pictures.values()
        for each in pictures
        if each.seed is not None
    }
    for system in run.systems:
        name = str(system["name"])
        scores = results.systems[name].scores.get("clip") if results is not None and name in results.systems else None
        for each in run.pictures[name]:
            clip = scores.per_prompt[each.prompt] if scores is not None and scores.per_prompt is not None else None
            seed = seeds.get((each.prompt, each.index), each.index)
            yield Entrant(spelled(system), run.suite.prompts[each.prompt].text, seed, each.file.read_bytes(), clip)


def spelled(system: Mapping[str, Any]) -> str:
    """A system of `run.json`, with the versions of its adapters."""
    if system["kind"] != "adapter":
        return str(system["name"])
    parts = []
    for (reference, weight), (version, _) in zip(
        adapters_of(system["target"]), system["identity"]["adapters"], strict=True
    ):
        if reference.endswith(".safetensors"):
            return str(system["name"])
        name = f"{reference.partition('@')[0]}@{version[:VERSION_DIGITS]}"
        parts.append(name if weight == 1 else f"{name}:{weight:g}")
    return "+".join(parts)
