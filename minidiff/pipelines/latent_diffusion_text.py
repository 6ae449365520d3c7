"""The first text-to-image latent diffusion (arXiv 2112.10752, section 4.3.1): BERT's words, an encoder of its own."""

import torch
from torch import Tensor

from ..checks import as_integer, check_number
from ..images import check_output_type, to_output
from ..models import AutoencoderKL, BertTokenizer, LDMBertModel, UNet2DConditionModel, VQModel
from ..noise import Generators
from ..schedulers.base import Scheduler
from .base import DiffusionPipeline, ImageOutput
from .denoise import denoise, plan
from .latents import first_noise
from .memory import device_of
from .prompt import as_texts, read_text

LENGTH = 77  # of a text, in tokens


class LDMTextToImagePipeline(DiffusionPipeline):
    """The model has no negative prompt: the pass without the prompt reads an empty text."""

    def __init__(
        self,
        vqvae: VQModel | AutoencoderKL,
        bert: LDMBertModel,
        tokenizer: BertTokenizer,
        unet: UNet2DConditionModel,
        scheduler: Scheduler,
    ):
        self.register_modules(vqvae=vqvae, bert=bert, tokenizer=tokenizer, unet=unet, scheduler=scheduler)

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale != 1

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImageOutput | tuple:
        """One picture for each prompt.

        Args:
            height, width: in pixels, multiples of 8; by default what the UNet was trained at.
            guidance_scale: how far to follow the prompt; at 1 no unconditional pass is made.
            eta: DDIM's; its noise is torch's own, and not `generator`'s.
            latents: the first noise (B, 4, height / 8, width / 8), instead of drawing it.
            output_type: "pil"; "np", (B, H, W, 3) in [0, 1]; or "pt", (B, 3, H, W) in [0, 1].
        """
        check_output_type(output_type, ("pil", "np", "pt"))
        check_number(guidance_scale, "guidance_scale")
        check_number(eta, "eta", least=0)
        texts, factor, trained = as_texts("prompt", prompt), self.vqvae.factor, self.unet.config.sample_size
        trained = trained if isinstance(trained, tuple) else (trained, trained)
        sizes = []
        for name, value, default in (("height", height, trained[0]), ("width", width, trained[1])):
            size = as_integer((default or 32) * factor if value is None else value, name)
            if size <= 0 or size % factor:
                raise ValueError(f"{name}={size} must be a positive multiple of {factor}")
            sizes.append(size // factor)
        with self.running(guidance_scale=guidance_scale) as run:
            timesteps = plan(run.scheduler, num_inference_steps, None, None)
            if run.scheduler.init_noise_sigma != 1:
                raise ValueError(
                    f"scheduler is a {type(run.scheduler).__name__}, which goes by noise levels: the reference's"
                    " pipeline scales nothing for it. DDIMScheduler and PNDMScheduler draw here"
                )
            device, dtype = run._execution_device, run.unet.dtype
            both = [""] * len(texts) + texts if run.do_classifier_free_guidance else texts
            options = {"padding": "max_length", "max_length": LENGTH, "truncation": True, "return_tensors": "pt"}
            states = run.bert(run.tokenizer(both, **options).input_ids.to(device_of(run.bert)))[0].to(device)
            shape = (len(texts), run.unet.config.in_channels, *sizes)
            noise = first_noise(shape, generator, latents, device, dtype)
            tensors = {"latents": noise, "prompt_embeds": states.to(dtype)}
            latents = denoise(run, tensors, timesteps, told=read_text, eta=eta)
            pictures = run.vqvae.decode(
                (latents / run.vqvae.config.scaling_factor).to(device_of(run.vqvae), run.vqvae.dtype)
            ).sample
        result = ImageOutput(to_output(pictures, output_type))
        return result if return_dict else tuple(result)
