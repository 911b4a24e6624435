"""The model: load an SDXL base, encode prompts, decode latents. torch and diffusers, no ray.

`config`, `folder` and `limits` import no torch, so that a gateway or a command line can use them at once.
"""

import logging

# transformers says twice at import that it falls back from torchvision, which nothing here uses.
logging.getLogger("transformers.utils.import_utils").setLevel(logging.ERROR)
