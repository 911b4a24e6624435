"""The embedded base model, made by `lorafleet.models.build`, and its sample adapters: where their files lie."""

from pathlib import Path

EMOJIXL = Path(__file__).resolve().parent / "emojixl"
"""Folder of emojixl in diffusers' layout, with `scorer/` beside the pipeline's own parts."""

SAMPLE_REGISTRY = EMOJIXL.parent / "registry"
"""Folder in a registry's layout with the adapters that `make train-demo` trained for emojixl."""
