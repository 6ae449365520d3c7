"""How the notebooks show pictures."""

import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor


def show(pictures, titles=(), columns: int = 8, size: float = 1.1) -> None:
    """A grid of pictures, `size` inches each: PIL images, or a tensor (B, 3, H, W) or (B, H, W) in [0, 1]."""
    if isinstance(pictures, Tensor):
        pictures = pictures.detach().clamp(0, 1)
        pictures = pictures.permute(0, 2, 3, 1) if pictures.ndim == 4 else pictures
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(columns * size, rows * (size + 0.25 * bool(titles))))
    for axis in np.ravel(axes):
        axis.axis("off")
    for i, (axis, picture) in enumerate(zip(np.ravel(axes), pictures, strict=False)):
        axis.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(titles[i] if i < len(titles) else "", fontsize=8, pad=3)
    figure.tight_layout(pad=0.3)
    plt.show()
