"""How emojixl, the embedded base, was made: from a font's bitmaps to a diffusers folder, stage by stage.

Run `python -m lorafleet.models.build --help`. Nothing here is imported at run time.
"""
