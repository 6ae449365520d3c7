"""Random numbers, drawn so that one seed gives one picture, whatever the device and the batch."""

import torch
from torch import Tensor

Generators = torch.Generator | list[torch.Generator] | None


def randn_tensor(
    shape: tuple[int, ...],
    generator: Generators = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Normal noise of `shape` on `device`, in `dtype`.

    A CPU generator draws on the CPU and the result moves to the device, so that a seed means the same picture
    everywhere. A list holds one generator a sample (`shape[0]` of them): each draws as it would for its sample alone.

    Raises ValueError for a list of the wrong length, or a generator that lives neither on the CPU nor on `device`;
    TypeError for what is no generator.
    """
    device = torch.device(device or "cpu")
    generators = list(generator) if isinstance(generator, list | tuple) else [generator]
    for one in generators if generator is not None else ():
        if not isinstance(one, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or a list of them, but there is {one!r}")
        if one.device.type not in ("cpu", device.type):
            raise ValueError(f"generator lives on {one.device}, which can't draw for {device}; use one of the CPU")
    if len(generators) not in (1, shape[0]):
        raise ValueError(f"generator is a list of {len(generators)}, but the batch has {shape[0]} samples")

    def draw(shape: tuple[int, ...], one: torch.Generator | None) -> Tensor:
        source = device if one is None else one.device
        return torch.randn(shape, generator=one, device=source, dtype=dtype).to(device)

    if len(generators) == 1:
        return draw(tuple(shape), generators[0])
    return torch.cat([draw((1, *shape[1:]), one) for one in generators])
