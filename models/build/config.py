"""Every number of the recipe. A change here means training again: `emojixl` travels with the repository."""

from dataclasses import dataclass

SEED = 20261123
CANVAS_PX = 128
CONTEXT = 40  # tokens a caption may have, the two markers included
VOCAB = 2048

COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (20, 20, 20),
    "red": (215, 45, 45),
    "green": (50, 150, 70),
    "blue": (45, 95, 215),
    "yellow": (245, 215, 60),
    "purple": (130, 65, 180),
    "pink": (250, 160, 200),
    "orange": (245, 145, 40),
    "gray": (130, 130, 130),
    "brown": (120, 75, 40),
    "cyan": (70, 205, 225),
}
TINTS = ("red", "green", "blue", "yellow", "purple", "pink", "orange", "gray", "brown", "cyan")

# (height, width) in pixels: most steps are square, the others teach the micro-conditioning something to mean.
SQUARE = (128, 128)
BUCKETS = ((96, 160), (160, 96), (128, 192), (192, 128))

HELD_OUT_SHARE = 0.05  # of all (emoji, background) pairs, never rendered in training


@dataclass(frozen=True)
class Stage:
    """How long and how fast one stage trains."""

    steps: int
    batch: int
    peak_lr: float
    weight_decay: float = 0.01
    warmup: int = 300
    ema_decay: float = 0.0


TEXT = Stage(steps=1800, batch=1024, peak_lr=1e-3, weight_decay=0.05)
SCORER = Stage(steps=4000, batch=2048, peak_lr=1e-3, weight_decay=0.05)
VAE = Stage(steps=5_340, batch=64, peak_lr=1e-3, weight_decay=0.0)
DECODER = Stage(steps=3_375, batch=64, peak_lr=5e-4, weight_decay=0.0)
DECODER_NOISE = 0.1  # of the latents' standard deviation
UNET = Stage(steps=13_459, batch=512, peak_lr=1e-3, ema_decay=0.9995)
PAIR_SHARE = 0.3  # of the captions name two subjects
UNET_PAIR_SHARE = 0.6
CAPTIONS = 1_000_000  # drawn once for a stage, rendered anew each time
LATENTS = 400_000  # square renderings encoded once, before the UNet trains on them
BUCKET_LATENTS = 20_000  # of each other size
BUCKET_EVERY = 12  # one step in so many trains on another size
CAPTION_DROPOUT = 0.1
MIN_SNR_GAMMA = 5.0

TEXT_ENCODER = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4)
TEXT_PROJECTION = 128
TEXT_VISION = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4)
SCORER_TEXT = dict(hidden_size=160, intermediate_size=640, num_hidden_layers=3, num_attention_heads=5)
SCORER_VISION = dict(hidden_size=192, intermediate_size=768, num_hidden_layers=4, num_attention_heads=6)
SCORER_PROJECTION = 96
PATCH_PX = 16

VAE_CHANNELS = (32, 64, 128, 128)
UNET_CHANNELS = (64, 128, 160)
NUM_TRAIN_TIMESTEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012  # "scaled_linear", as SDXL
