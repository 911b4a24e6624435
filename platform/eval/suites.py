"""Prompt suites: versioned lists of prompts in categories, and the settings that they are drawn with.

A suite is named by a shipped one (`classic5`, `emoji`), a YAML file, or a loader and what it loads:
    coco:FILE            captions_val2014.json and its like; the first caption of each picture
    parti:FILE           PartiPrompts.tsv: columns Prompt and Category
    captions:TRAIN[:HELD_OUT]   captioned pictures; the first folder's captions are marked as trained on
"""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Final

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from lorafleet.core.config import MAX_FILE_BYTES
from lorafleet.core.errors import DataNotFound, DataUnreadable, InvalidRequest
from lorafleet.core.generation import Guidance, NegativePrompt, SchedulerName, SidePx, Steps
from lorafleet.core.generation import Prompt as PromptText
from lorafleet.core.ranges import short
from lorafleet.eval.captioned import read_captioned

SUFFIXES: Final = (".yaml", ".yml")
UNCATEGORISED: Final = "all"
_Label = Annotated[str, StringConstraints(min_length=1, max_length=80, pattern=r"^[^\x00-\x1f]+$")]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Prompt(_Strict):
    """One text to draw."""

    id: _Label = Field(description="short, the same in every version of the suite")
    text: PromptText = Field(description="what to draw")
    category: _Label = Field(default=UNCATEGORISED, description="results are told for each")
    negative: NegativePrompt = Field(default="", description="what to avoid")
    trained: bool | None = Field(
        default=None, description="whether training showed it, for the check of overfitting; empty: nobody knows"
    )


class Settings(_Strict):
    """What prompts are drawn with where nobody says otherwise."""

    steps: Steps = Field(default=20, description="denoising steps")
    guidance_scale: Guidance = Field(default=5.0, description="classifier-free guidance")
    scheduler: SchedulerName = Field(default="euler", description="the sampler")
    seeds: int = Field(default=1, ge=1, le=64, description="pictures a prompt")
    width: SidePx | None = Field(default=None, description="pixels; empty: each model's own")
    height: SidePx | None = Field(default=None, description="pixels; empty: each model's own")


class Suite(_Strict):
    """Prompts in their order."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
    version: int = Field(default=1, ge=1, description="raised whenever a prompt changes")
    description: str = Field(default="", max_length=2000)
    training: str = Field(
        default="training", max_length=200, description="whose training the prompts' `trained` is about, for the report"
    )
    settings: Settings = Settings()
    prompts: tuple[Prompt, ...]

    @model_validator(mode="after")
    def _check(self) -> "Suite":
        if not self.prompts:
            raise ValueError("the suite holds no prompts: add at least one under `prompts`")
        for what, values in (("id", [p.id for p in self.prompts]), ("text", [p.text for p in self.prompts])):
            twice = [value for value, count in Counter(values).items() if count > 1]
            if twice:
                raise ValueError(f"the {what} {short(twice[0])} stands there twice")
        return self

    @cached_property
    def digest(self) -> str:
        """sha256 over ids, texts, negatives and categories in their order, 64 hex digits."""
        rows = [[each.id, each.text, each.negative, each.category] for each in self.prompts]
        return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()

    @property
    def categories(self) -> list[str]:
        """In the order in which they first come."""
        return list(dict.fromkeys(each.category for each in self.prompts))

    def limited(self, count: int | None) -> "Suite":
        """At most so many prompts, spread evenly over the suite, so that every large category stays."""
        if count is None or count >= len(self.prompts):
            return self
        step = len(self.prompts) / count
        return self.model_copy(update={"prompts": tuple(self.prompts[int(i * step)] for i in range(count))})


def shipped() -> list[str]:
    """Names of the suites that come with the package."""
    folder = resources.files("lorafleet.eval") / "prompts"
    return sorted(Path(each.name).stem for each in folder.iterdir() if each.name.endswith(SUFFIXES))


def load_suite(spelled: str) -> Suite:
    """The suite that a command line names, as the module's docstring tells.

    Raises DataNotFound for what is not there, DataUnreadable naming the file and the item that is wrong, and
    InvalidRequest for a loader that is none.
    """
    loader, colon, rest = spelled.partition(":")
    if colon and loader in _LOADERS:
        if not rest:
            raise InvalidRequest(f"--suite {loader}: needs a path after the colon.", param="suite")
        return _LOADERS[loader](rest)
    if spelled in shipped():
        text = (resources.files("lorafleet.eval") / "prompts" / f"{spelled}.yaml").read_text("utf-8")
        return _parse(text, spelled)
    path = Path(spelled).expanduser()
    if path.suffix not in SUFFIXES:
        raise InvalidRequest(
            f"there is no suite {short(spelled)}: give {', '.join(shipped())}, a .yaml file, "
            f"or {', '.join(f'{name}:PATH' for name in _LOADERS)}.",
            param="suite",
        )
    return _parse(_text(path), str(path))


def _parse(text: str, where: str) -> Suite:
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise DataUnreadable(f"{where}{line} is not YAML: {getattr(error, 'problem', None) or error}.") from None
    if not isinstance(tree, dict):
        raise DataUnreadable(f"{where} must hold a suite: name, version and prompts.")
    return _suite(tree, where)


def _suite(tree: Mapping[str, Any], where: str) -> Suite:
    try:
        return Suite.model_validate(tree)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        path = ".".join(str(part) for part in problem["loc"])
        item = _item(tree, problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        raise DataUnreadable(f"{where}: {f'{path}{item}: ' if path else ''}{message}.") from None


def _item(tree: Mapping[str, Any], loc: tuple[int | str, ...]) -> str:
    """The prompt's id, where the place is a prompt."""
    if len(loc) < 2 or loc[0] != "prompts" or not isinstance(loc[1], int):
        return ""
    prompt = tree["prompts"][loc[1]]
    return f" ({prompt['id']})" if isinstance(prompt, dict) and "id" in prompt else ""


def _text(path: Path, max_bytes: int = MAX_FILE_BYTES) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataNotFound(f"there is no suite file {path}.", param="suite") from None
    except OSError as error:
        raise DataUnreadable(f"{path} cannot be read: {error.strerror}.", param="suite") from error
    if len(data) > max_bytes:
        raise DataUnreadable(f"{path} is larger than {max_bytes >> 20} MiB: that is no suite.", param="suite")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise DataUnreadable(f"{path} is not UTF-8 text.", param="suite") from None


def _coco(rest: str) -> Suite:
    """The first caption of each picture, by picture id, as COCO's captions files have them."""
    path = Path(rest).expanduser()
    try:
        tree = json.loads(_text(path, 1 << 30))
        captions: dict[int, tuple[int, str]] = {}
        for each in tree["annotations"]:
            number, caption = int(each["image_id"]), (int(each["id"]), str(each["caption"]).strip())
            captions[number] = min(captions.get(number, caption), caption)
    except (ValueError, KeyError, TypeError) as error:
        raise DataUnreadable(f"{path} is no COCO captions file (annotations: image_id, id, caption): {error}") from None
    prompts = [{"id": str(number), "text": text} for number, (_, text) in sorted(captions.items())]
    return _suite({"name": "coco", "prompts": _distinct(prompts)}, str(path))


def _parti(rest: str) -> Suite:
    path = Path(rest).expanduser()
    rows = list(csv.DictReader(_text(path, 64 << 20).splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))
    if not rows or not {"Prompt", "Category"} <= rows[0].keys():
        raise DataUnreadable(f"{path} has no columns Prompt and Category, separated by tabs: that is no PartiPrompts.")
    prompts = []
    for number, row in enumerate(rows, 1):
        if not row["Prompt"] or not row["Category"]:
            raise DataUnreadable(f"{path} row {number} has no Prompt or no Category.")
        prompts.append({"id": f"{number:04}", "text": row["Prompt"].strip(), "category": row["Category"].strip()})
    return _suite({"name": "parti", "prompts": _distinct(prompts)}, str(path))


def _captions(rest: str) -> Suite:
    folders = [Path(part).expanduser() for part in rest.split(":")]
    if len(folders) > 2:
        raise InvalidRequest("--suite captions: takes TRAIN or TRAIN:HELD_OUT.", param="suite")
    prompts = [
        {
            "id": f"{folder.name}/{each.file.name}",
            "text": each.captions[0],
            "category": folder.name,
            "trained": number == 0,
        }
        for number, folder in enumerate(folders)
        for each in read_captioned(folder)
        if each.captions
    ]
    return _suite({"name": "captions", "prompts": _distinct(prompts)}, rest)


def _distinct(prompts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first of those with equal texts: other people's files repeat some."""
    return list({each["text"]: each for each in reversed(prompts)}.values())[::-1]


_LOADERS: Final[Mapping[str, Callable[[str], Suite]]] = {"coco": _coco, "parti": _parti, "captions": _captions}
