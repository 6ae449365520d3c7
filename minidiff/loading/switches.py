"""Switches of networks, under the reference's names. Some have nothing to do here, and say so."""

from typing import Any

from torch import nn

SAME_NUMBERS = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor")


class Switches:
    """What a `Model` has besides its weights."""

    gradient_checkpointing: bool

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.gradient_checkpointing

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers the network has learned: all, those that train, those outside of `nn.Embedding`."""
        embeddings = {
            id(module.weight) for module in self.modules() if exclude_embeddings and isinstance(module, nn.Embedding)
        }
        counted = (p for p in self.parameters() if id(p) not in embeddings and (p.requires_grad or not only_trainable))
        return sum(p.numel() for p in counted)

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """Nothing to do: attention never holds all pairs of tokens here (minidiff/layers.py). xformers isn't needed,
        and its operators (`attention_op`) aren't taken."""
        if attention_op is not None:
            raise ValueError("attention_op must be None: attention is that of minidiff/layers.py")

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Nothing to do: xformers is never used."""

    def set_attention_slice(self, slice_size: str | int | list[int] | None = "auto") -> None:
        """Nothing to do: attention here (minidiff/layers.py) takes less memory than attention in slices does."""

    def set_default_attn_processor(self) -> None:
        """Nothing to do: there is one attention."""

    def set_attn_processor(self, processor: Any) -> None:
        """Nothing to do for the reference's processors that compute the same in another way. Raises ValueError for
        those that compute something else: attention is written out here, in `minidiff.models.unet.Attention`."""
        for one in processor.values() if isinstance(processor, dict) else [processor]:
            if type(one).__name__ not in SAME_NUMBERS:
                raise ValueError(
                    f"processor is a {type(one).__name__}, but minidiff has no attention processors, and the one"
                    " attention of minidiff.models.unet.Attention: replace those modules, or hook them, to change it"
                )

    @property
    def attn_processors(self) -> dict[str, Any]:
        """There are none. Raises NotImplementedError, which says where attention is."""
        names = [name for name, module in self.named_modules() if name.rpartition(".")[2].endswith("attention")]
        raise NotImplementedError(
            "minidiff has no attention processors: attention is minidiff.models.unet.Attention, here in"
            f" {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        )
