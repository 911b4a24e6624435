"""The embedded base model: where its files lie. How it was made is in `lorafleet.models.build`."""

from pathlib import Path

EMOJIXL = Path(__file__).resolve().parent / "emojixl"
"""Folder of emojixl in diffusers' layout, with `scorer/` beside the pipeline's own parts."""
