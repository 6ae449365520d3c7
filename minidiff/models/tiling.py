"""Pictures too large for memory: a network applied tile by tile, with neighbours faded into one another.

Each tile sees itself alone (attention and norms too), so that the result isn't that of the whole picture: tiles
overlap, and across the overlap the older one goes over into the newer one.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Network = Callable[[Tensor], Tensor]


def in_tiles(network: Network, x: Tensor, sizes: tuple[int, int], overlap: float, scale: float) -> Tensor:
    """What `network` makes of `x` (B, C, H, W), `scale` times as high and wide: in square tiles of the first of
    `sizes`, which become the second, and of which each has the share `overlap` in common with the next.

    Raises ValueError for sizes of which the tiles' edges wouldn't meet.
    """
    size, size_out = sizes
    step, fade = int(size * (1 - overlap)), int(size_out * overlap)
    kept = size_out - fade  # of each tile: the rest is the next one's
    if step < 1 or step * scale != kept:
        raise ValueError(
            f"tiles of {size} that become {size_out}, with tile_overlap_factor={overlap}, begin {step} apart, which"
            f" become {step * scale:g}, but {kept} of each are kept: take a tile_sample_min_size that is"
            f" {max(scale, 1 / scale):g} times tile_latent_min_size, and an overlap of whole latents"
        )
    above, rows = [], []
    for top in range(0, x.shape[2], step):
        row: list[Tensor] = []
        for left in range(0, x.shape[3], step):
            tile = network(x[:, :, top : top + size, left : left + size])
            if above:
                tile = faded(above[len(row)], tile, fade, dim=2)
            if row:
                tile = faded(row[-1], tile, fade, dim=3)
            row.append(tile)
        rows.append(torch.cat([tile[:, :, :kept, :kept] for tile in row], dim=3))
        above = row
    return torch.cat(rows, dim=2)


def faded(before: Tensor, tile: Tensor, fade: int, dim: int) -> Tensor:
    """`tile`, whose first `fade` rows (`dim` 2) or columns (3) go over from the last ones of the tile before."""
    fade = min(before.shape[dim], tile.shape[dim], fade)
    weight = torch.arange(fade, dtype=torch.float64) / fade  # 0 .. 1 - 1 / fade
    weight = weight.view(-1, 1) if dim == 2 else weight
    last, tile = before.narrow(dim, before.shape[dim] - fade, fade), tile.clone()
    first = tile.narrow(dim, 0, fade)
    first.copy_(last * (1 - weight).to(tile) + first * weight.to(tile))
    return tile


def in_pasted_tiles(network: Network, x: Tensor, size: int, overlap: float, scale: float) -> Tensor:
    """The same as AutoencoderTiny does it: every tile over those before it, through ramps along its upper and left
    edge, which are multiplied where they cross. A side that ends within a tile's overlap gets one tile more.

    Raises ValueError for sizes that aren't whole latents.
    """
    fade = int(size * overlap)
    step = size - fade
    if step < 1 or step * scale % 1 or fade * scale < 2:
        raise ValueError(
            f"tiles of {size} with tile_overlap_factor={overlap} begin {step} apart and have {fade} in common: the"
            " first must be whole latents, the second two or more"
        )
    ramp = (torch.arange(int(size * scale), device=x.device) / (fade * scale - 1)).clamp(0, 1)
    out: Tensor | None = None
    for top in range(0, x.shape[2], step):
        for left in range(0, x.shape[3], step):
            tile = network(x[:, :, top : top + size, left : left + size])
            (y, h), (z, w) = ((int(at * scale), side) for at, side in zip((top, left), tile.shape[2:], strict=True))
            if out is None:
                out = tile.new_zeros(*tile.shape[:2], *(math.ceil(side * scale) for side in x.shape[2:]))
            weight = (ramp[:h, None] if top else 1) * (ramp[:w] if left else torch.ones_like(ramp[:w]))
            out[:, :, y : y + h, z : z + w].lerp_(tile, weight.to(tile).expand_as(tile))
    return out
