"""Pictures for captions, drawn on the accelerator: an emoji or two, moved, turned, scaled, over a colour."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lorafleet.models.build import config
from lorafleet.models.build.captions import Captions
from lorafleet.models.build.data import Data


class Renderer:
    """Draws rows of a caption pool. All methods are deterministic in their generator (on `device`)."""

    def __init__(self, data: Data, device: torch.device) -> None:
        self.device = device
        rgba = torch.from_numpy(data.bitmaps).to(device).permute(0, 3, 1, 2)
        self.alpha = rgba[:, 3:]  # uint8 [N, 1, 128, 128]
        self.rgb = rgba[:, :3]
        self.mirrored = torch.from_numpy(data.mirrored).to(device)
        self.colours = torch.tensor(list(config.COLOURS.values()), device=device) / 255

    def draw(self, captions: Captions, rows: Tensor, size: tuple[int, int], g: torch.Generator) -> Tensor:
        """Pictures of the captions `rows` (int64 [B], on the CPU): float [B, 3, *size] in [-1, 1]."""
        column = lambda a: torch.from_numpy(a).to(self.device)[rows.to(self.device)].long()  # noqa: E731
        return self.compose(
            column(captions.subject),
            column(captions.second),
            column(captions.tint),
            column(captions.background),
            size,
            g,
        )

    def compose(
        self,
        subject: Tensor,
        second: Tensor,
        tint: Tensor,
        background: Tensor,
        size: tuple[int, int],
        g: torch.Generator,
    ) -> Tensor:
        """As `draw`, from int64 [B] tensors on the device (-1: none)."""
        canvas = self.colours[background][:, :, None, None].expand(-1, -1, *size)
        pair = second >= 0
        first, other = self._place(pair, size, g)
        picture = self._over(canvas, subject, tint, *first, size)
        if pair.any():
            none = torch.full_like(tint, -1)
            both = self._over(picture[pair], second[pair], none[pair], other[0][pair], other[1][pair], size)
            picture = picture.clone()
            picture[pair] = both
        return picture * 2 - 1

    def _place(self, pair: Tensor, size: tuple[int, int], g: torch.Generator) -> list[tuple[Tensor, Tensor]]:
        """For the first and the second subject: affine maps from canvas to bitmap, float [B, 2, 3] (see
        `F.affine_grid`), and which way it faces, float [B] of 1 or -1."""
        (height, width), count = size, len(pair)
        u = lambda low, high: low + (high - low) * torch.rand(count, device=self.device, generator=g)  # noqa: E731
        side = min(height, width)
        maps = []
        for slot in (0, 1):
            # Extent of the emoji on the canvas as a share of the shorter side; a pair shares the width.
            scale = torch.where(pair, u(0.44, 0.54) * min(1.25, width / side), u(0.6, 1.0))
            angle = u(-1, 1) * torch.rand(count, device=self.device, generator=g) * 0.44  # radians, mostly small
            free_x, free_y = 1 - scale * side / width, 1 - scale * side / height
            centre_x = torch.where(pair, (0.5 if slot else -0.5) + u(-0.04, 0.04), u(-1, 1) * free_x)
            centre_y = torch.where(pair, u(-0.5, 0.5), u(-1, 1)) * free_y
            flip = torch.where(u(0, 1) < 0.5, -1.0, 1.0)
            cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
            ax, ay = width / side, height / side  # canvas units to units of the shorter side
            # bitmap = R(-angle) / scale * ((x - cx) * ax, (y - cy) * ay)
            m = torch.stack([cos * ax, sin * ay, -sin * ax, cos * ay], -1).view(-1, 2, 2)
            shift = -(m @ torch.stack([centre_x, centre_y], -1)[..., None])
            maps.append((torch.cat([m, shift], -1), flip))
        return maps

    def _over(
        self, canvas: Tensor, emoji: Tensor, tint: Tensor, place: Tensor, flip: Tensor, size: tuple[int, int]
    ) -> Tensor:
        """Draw bitmaps over `canvas` (float [B, 3, H, W] in [0, 1])."""
        facing = torch.stack([torch.where(self.mirrored[emoji], flip, 1.0), torch.ones_like(flip)], -1)
        place = place * facing[:, :, None]
        alpha = self.alpha[emoji].float() / 255
        rgb = self.rgb[emoji].float() / 255
        rgb = torch.where((tint >= 0)[:, None, None, None], self._tinted(rgb, self.colours[tint]), rgb)
        grid = F.affine_grid(place, [len(place), 4, *size], align_corners=False)
        layer = F.grid_sample(torch.cat([rgb * alpha, alpha], 1), grid, align_corners=False)
        return layer[:, :3] + canvas * (1 - layer[:, 3:])

    @staticmethod
    def _tinted(rgb: Tensor, colour: Tensor) -> Tensor:
        """The bitmap in shades of one colour: black to colour to white by luminance (Rec. 601)."""
        weights = torch.tensor([0.299, 0.587, 0.114], device=rgb.device)[:, None, None]
        light = (rgb * weights).sum(1, keepdim=True).mul(0.9)
        colour = colour[:, :, None, None]
        return torch.where(light < 0.6, colour * light / 0.6, colour + (1 - colour) * (light - 0.6) / 0.4 * 0.6)
