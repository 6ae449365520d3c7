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

    Raises ValueError for a list of the wrong length, or a generator that lives on another accelerator than `device`.
    """
    device = torch.device(device or "cpu")
    if isinstance(generator, list | tuple) and len(generator) == 1:
        generator = generator[0]
    if isinstance(generator, list | tuple):
        if len(generator) != shape[0]:
            raise ValueError(
                f"generator has {len(generator)} entries for {shape[0]} samples: give one, or one each"
            )
        return torch.cat([randn_tensor((1, *shape[1:]), one, device, dtype) for one in generator])
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or a list of them, not {type(generator).__name__}")
    if generator is not None and generator.device.type not in ("cpu", device.type):
        raise ValueError(f"generator lives on {generator.device}, which can't draw for {device}; use one on the CPU")
    source = generator.device if generator is not None else device
    return torch.randn(shape, generator=generator, device=source, dtype=dtype).to(device)
