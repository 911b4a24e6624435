"""What is compared: anything that turns prompts into pictures, as a command line spells it and as a run resolves it.

    [NAME=]KIND[:TARGET][,OPTION=VALUE]...

    base                                          the base model alone
    style=adapter:noto-sticker@latest:0.8         the base with adapters of the registry (NAME[@ALIAS][:WEIGHT], several
                                                  joined by +), or with files: adapter:path/to/file.safetensors:0.5
    sd15=pipeline:stable-diffusion-v1-5/stable-diffusion-v1-5   another diffusers pipeline, a folder or a hub id
    turbo=pipeline:stabilityai/sdxl-turbo,steps=4,guidance=0
    api=http://127.0.0.1:8000,adapters=plush:0.8  a running Lorafleet
    dalle=openai:https://api.openai.com,model=dall-e-3
    mini=folder:PATH                              ready pictures with captions (metadata.jsonl, metadata.csv, .txt)

What an endpoint drew is kept for the same command; with another folder for the run it is asked anew, as what stands
behind an address changes.

Options: steps, guidance, scheduler (of this system only, in place of the suite's); revision (of a hub id); model and
adapters (of an endpoint). Imports no torch.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, get_args

from pydantic import TypeAdapter, ValidationError

from lorafleet.core.adapter_cache import sha256
from lorafleet.core.errors import DataNotFound, InvalidRequest
from lorafleet.core.generation import SCHEDULERS, AdapterUse, AdapterUses, Guidance, Steps
from lorafleet.core.manifest import Manifest
from lorafleet.core.ranges import short
from lorafleet.core.registry import open_registry
from lorafleet.eval.config import EvalConfig
from lorafleet.sdxl.fingerprint import fingerprint
from lorafleet.sdxl.folder import BaseFolder, find_base, read_header

Kind = Literal["base", "adapter", "pipeline", "lorafleet", "openai", "folder"]
KINDS: Final[tuple[str, ...]] = get_args(Kind)
DRAWN_HERE: Final = ("base", "adapter", "pipeline")
OPTIONS: Final = ("steps", "guidance", "scheduler", "revision", "model", "adapters")
MAX_SYSTEMS: Final = 32

_NAMED: Final = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]{0,39})=(.+)$", re.S)
_OPTION: Final = re.compile(rf",({'|'.join(OPTIONS)})=([^,]*)$")
_STEPS: Final[TypeAdapter[int]] = TypeAdapter(Steps)
_GUIDANCE: Final[TypeAdapter[float]] = TypeAdapter(Guidance)
_USES: Final[TypeAdapter[list[AdapterUse]]] = TypeAdapter(AdapterUses)


@dataclass(frozen=True)
class SystemSpec:
    """A system as it was asked for."""

    name: str
    kind: Kind
    target: str = ""
    options: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "SystemSpec":
        """Raises InvalidRequest, saying what of the text is wrong."""
        named = _NAMED.match(text)
        rest = named[2] if named else text
        options: dict[str, str] = {}
        while found := _OPTION.search(rest):
            options.setdefault(found[1], found[2])
            rest = rest[: found.start()]
        kind, _, target = rest.partition(":")
        if kind in ("http", "https"):
            kind, target = "lorafleet", rest
        if kind not in KINDS:
            raise InvalidRequest(
                f"--system {short(text)}: {short(kind)} is no kind of system; kinds are {', '.join(KINDS)} "
                "(or an http address), such as style=adapter:plush:0.8.",
                param="system",
            )
        if (kind == "base") == bool(target):
            needs = "takes nothing after a colon" if kind == "base" else f"needs what follows {kind}:"
            raise InvalidRequest(f"--system {short(text)}: {kind} {needs}.", param="system")
        if kind in ("lorafleet", "openai") and not re.match(r"https?://[^/\s]+", target):
            raise InvalidRequest(f"--system {short(text)}: {short(target)} is no http address.", param="system")
        name = named[1] if named else _usual_name(kind, target)
        return cls(name, kind, target.rstrip("/") if "://" in target else target, options)  # type: ignore[arg-type]

    def weighted(self, weight: float) -> "SystemSpec":
        """The same adapters, all at this weight, under a name that says so."""
        parts = "+".join(f"{reference}:{weight:g}" for reference, _ in adapters_of(self.target))
        return SystemSpec(f"{self.name}-{weight:g}", self.kind, parts, self.options)


@dataclass(frozen=True)
class AdapterSource:
    """An adapter that a system uses: the registry's version, or a file of this machine."""

    weight: float
    sha256: str
    manifest: Manifest | None = None
    file: Path | None = None


@dataclass(frozen=True)
class System:
    """A system as a run uses it.

    `identity`: all that decides its pictures beside prompt, seed and sampling; JSON. `steps`, `guidance_scale`,
    `scheduler`: of its own. `training`: seconds, trainable parameters and their share of the base's UNet, where known.
    """

    name: str
    kind: Kind
    target: str
    identity: Mapping[str, Any]
    adapters: tuple[AdapterSource, ...] = ()
    model: str | None = None
    uses: tuple[AdapterUse, ...] = ()
    revision: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    scheduler: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_drawn_here(self) -> bool:
        return self.kind in DRAWN_HERE

    @property
    def fingerprint(self) -> str:
        """sha256 of `identity`."""
        return digest_of(self.identity)


def digest_of(tree: Any) -> str:
    """sha256 over JSON with sorted keys, 64 hex digits."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, ensure_ascii=False, default=str).encode()).hexdigest()


def adapters_of(target: str) -> list[tuple[str, float]]:
    """`a:0.5+b@latest` -> references or files, each with its weight. Raises InvalidRequest."""
    found = []
    for part in target.split("+"):
        reference, colon, weight = part.rpartition(":")
        if not colon:
            reference, weight = part, "1"
        try:
            found.append((reference, float(weight)))
        except ValueError:
            raise InvalidRequest(f"adapter {short(part)} should be NAME:WEIGHT, the weight a number.") from None
    return found


def resolve_systems(specs: Sequence[SystemSpec], config: EvalConfig) -> list[System]:
    """What the specs mean now: aliases become versions, files their hashes. Nothing is loaded.

    Raises InvalidRequest for names that come twice, and what the registry or the base raise.
    """
    if not specs:
        raise InvalidRequest("give at least one --system, such as --system base.", param="system")
    if len(specs) > MAX_SYSTEMS:
        raise InvalidRequest(f"at most {MAX_SYSTEMS} systems are compared at once, not {len(specs)}.", param="system")
    names = [spec.name for spec in specs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InvalidRequest(f"two systems are called {twice[0]}: name them, as in other={twice[0]}...", param="system")
    resolver = _Resolver(config)
    return [resolver.resolve(spec) for spec in specs]


class _Resolver:
    """Looks at base and registry once for all systems."""

    def __init__(self, config: EvalConfig) -> None:
        self._config = config
        self._base: BaseFolder | None = None
        self._fingerprint = ""

    def resolve(self, spec: SystemSpec) -> System:
        own = _own_sampling(spec)
        if spec.kind == "base":
            return System(spec.name, spec.kind, "", {"kind": "base", "base": self._base_fingerprint()}, **own)
        if spec.kind == "adapter":
            return self._with_adapters(spec, own)
        if spec.kind == "pipeline":
            identity = {"kind": "pipeline", **pipeline_identity(spec.target, spec.options.get("revision"))}
            revision = spec.options.get("revision")
            return System(spec.name, spec.kind, spec.target, identity, revision=revision, **own)
        if spec.kind == "folder":
            folder = Path(spec.target).expanduser()
            if not folder.is_dir():
                raise DataNotFound(f"system {spec.name}: there is no folder {folder}.", param="system")
            return System(spec.name, spec.kind, str(folder), {"kind": "folder", "path": str(folder.absolute())}, **own)
        uses = tuple(_uses(spec))
        model = spec.options.get("model")
        identity = {
            "kind": spec.kind,
            "url": spec.target,
            "model": model,
            "adapters": [each.model_dump() for each in uses],
        }
        return System(spec.name, spec.kind, spec.target, identity, model=model, uses=uses, **own)

    def _with_adapters(self, spec: SystemSpec, own: Mapping[str, Any]) -> System:
        sources = [self._adapter(reference, weight, spec.name) for reference, weight in adapters_of(spec.target)]
        identity = {
            "kind": "adapter",
            "base": self._base_fingerprint(),
            "adapters": [[source.sha256, source.weight] for source in sources],
        }
        training = self._training(sources)
        return System(spec.name, spec.kind, spec.target, identity, tuple(sources), training=training, **own)

    def _adapter(self, reference: str, weight: float, system: str) -> AdapterSource:
        file = Path(reference).expanduser()
        if file.suffix != ".safetensors":
            manifest = open_registry(self._config.registry).resolve(reference, draw=0.0).manifest
            return AdapterSource(weight, manifest.version, manifest=manifest)
        if not file.is_file():
            raise DataNotFound(f"system {system}: there is no adapter file {file}.", param="system")
        digest = sha256(file)
        beside = file.with_name("adapter_config.json")
        if file.name == "adapter_model.safetensors" and beside.is_file():  # PEFT keeps the alphas there
            digest = hashlib.sha256(f"{digest}{sha256(beside)}".encode()).hexdigest()
        return AdapterSource(weight, digest, file=file.absolute())

    def _training(self, sources: Sequence[AdapterSource]) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        trained = [source.manifest.training for source in sources if source.manifest is not None]
        seconds = [each.seconds for each in trained if each is not None]
        if len(seconds) == len(sources):
            facts["seconds"] = sum(seconds)
        files = [
            source.file or open_registry(self._config.registry).pull(source.manifest)  # type: ignore[arg-type]
            for source in sources
        ]
        facts["parameters"] = sum(_parameters(file) for file in files)
        unet = sum(_parameters(file) for file in self._folder().weights["unet"])
        facts["share"] = facts["parameters"] / unet
        return facts

    def _folder(self) -> BaseFolder:
        if self._base is None:
            self._base = find_base(self._config.base)
        return self._base

    def _base_fingerprint(self) -> str:
        if not self._fingerprint:
            self._fingerprint = fingerprint(self._folder())
        return self._fingerprint


def pipeline_identity(target: str, revision: str | None) -> dict[str, Any]:
    """Of a diffusers folder a hash of its file names, sizes and times; of a hub id the id and its revision."""
    folder = Path(target).expanduser()
    if not folder.is_dir():
        return {"id": target, "revision": revision}
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    rows = [[str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return {"folder": str(folder.absolute()), "files": digest_of(rows)}


def _own_sampling(spec: SystemSpec) -> dict[str, Any]:
    own: dict[str, Any] = {}
    try:
        if "steps" in spec.options:
            own["steps"] = _STEPS.validate_python(spec.options["steps"])
        if "guidance" in spec.options:
            own["guidance_scale"] = _GUIDANCE.validate_python(spec.options["guidance"])
    except ValidationError as error:
        raise InvalidRequest(
            f"system {spec.name}: {error.errors()[0]['msg']}, not {short(error.errors()[0]['input'])}.", param="system"
        ) from None
    if "scheduler" in spec.options:
        own["scheduler"] = spec.options["scheduler"]
        if own["scheduler"] not in SCHEDULERS:
            raise InvalidRequest(
                f"system {spec.name}: scheduler is one of {', '.join(SCHEDULERS)}, not {short(own['scheduler'])}.",
                param="system",
            )
    return own


def _uses(spec: SystemSpec) -> list[AdapterUse]:
    if "adapters" not in spec.options:
        return []
    uses = [{"name": name, "weight": weight} for name, weight in adapters_of(spec.options["adapters"])]
    try:
        return _USES.validate_python(uses)
    except ValidationError as error:
        raise InvalidRequest(f"system {spec.name}: adapters: {error.errors()[0]['msg']}.", param="system") from None


def _parameters(file: Path) -> int:
    """Elements of all tensors but single numbers, which are alphas."""
    sizes = []
    for entry in read_header(file)[1].values():
        size = 1
        for side in entry["shape"]:
            size *= side
        sizes.append(size)
    return sum(size for size in sizes if size > 1)


def _usual_name(kind: str, target: str) -> str:
    if kind == "base":
        return "base"
    if kind == "adapter":
        parts = [Path(name).stem if name.endswith(".safetensors") else name for name, _ in adapters_of(target)]
        target = "+".join(parts)
    tail = target.rstrip("/").rsplit("/", 1)[-1] if kind != "adapter" else target
    return re.sub(r"[^A-Za-z0-9._-]+", "-", tail).strip("-._")[:40] or kind
