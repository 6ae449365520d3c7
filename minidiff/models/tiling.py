"""Pictures too large for memory: a network applied tile by tile, with neighbours faded into one another.

Each tile sees itself alone (attention and norms too), so that the result isn't that of the whole picture: tiles
overlap, and across the overlap the older one goes over into the newer one.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def in_tiles(
    network: Callable[[Tensor], Tensor], x: Tensor, size: int, size_out: int, overlap: float, scale: float
) -> Tensor:
    """What `network` makes of `x` (B, C, H, W), `scale` times as high and wide: in tiles of `size` x `size`, which
    become `size_out` x `size_out`, and of which each has the share `overlap` in common with the next.

    Raises ValueError for sizes of which the tiles' edges wouldn't meet.
    """
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
