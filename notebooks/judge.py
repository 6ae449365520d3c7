"""The judge of both models: a small network that says what is in a picture. `python judge.py` trains it on renders.

It reads what a prompt says: the things, the style, the colour, the size and the place. The renders that it learns from
are drawn anew at each step, held-out combinations too, blurred and noisy at random: it is to judge what is drawn, not
how sharp.
"""

import argparse
from pathlib import Path

import scenes
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from scenes import Scenes
from torch import Tensor, nn
from tqdm import tqdm

FILE = Path(__file__).parent / "data/judge.safetensors"
HEADS = {  # what it says, and among how many
    "left": len(scenes.THINGS),
    "right": len(scenes.THINGS) + 1,  # the last: nothing
    "style": len(scenes.STYLES),
    "colour": len(scenes.COLOURS),
    "size": len(scenes.SIZES),
    "place": len(scenes.PLACES),
}


class Judge(nn.Module):
    """Convolutions that halve the sides, from 64 down to 4, and one linear layer for each question."""

    def __init__(self):
        super().__init__()

        def layer(c_in: int, c_out: int, stride: int = 2) -> nn.Sequential:
            conv = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU())

        self.body = nn.Sequential(
            nn.Conv2d(3, 24, 5, 2, padding=2, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
            layer(24, 64), layer(64, 96, 1), layer(96, 160), layer(160, 160, 1), layer(160, 192), nn.Flatten(),
        )  # fmt: skip
        self.heads = nn.Linear(192 * 16, sum(HEADS.values()))

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Of float (B, 3, 64, 64) in [0, 1]: scores (B, n) for each of HEADS."""
        scores = self.heads(self.body(2 * pictures - 1)).float().split(list(HEADS.values()), dim=1)
        return dict(zip(HEADS, scores, strict=True))


def labels(wanted: Scenes) -> dict[str, Tensor]:
    """What the judge should say, (N,) each."""
    left, right = wanted.things.T
    right = torch.where(wanted.alone, len(scenes.THINGS), right)
    values = (left, right, wanted.style, wanted.colour, wanted.size, wanted.place)
    return dict(zip(HEADS, values, strict=True))


@torch.no_grad()
def read(judge: Judge, pictures: Tensor) -> dict[str, Tensor]:
    """What is in float (B, 3, 64, 64) in [0, 1]: the numbers, (B,) each."""
    every = [judge(batch.clamp(0, 1)) for batch in pictures.split(256)]
    return {head: torch.cat([scores[head].argmax(dim=1) for scores in every]) for head in HEADS}


def in_words(said: dict[str, Tensor], ask: str = "style colour") -> list[str]:
    """What was read, as prompts: "a glossy fox and a glossy key on a red background"."""
    left, right, *others = said.values()
    things = torch.stack([left, torch.where(right == len(scenes.THINGS), scenes.ALONE, right)], dim=1)
    return scenes.prompts(Scenes(things, *others, pose=torch.zeros(len(left), 2, 3)), ask)


def spoil(pictures: Tensor) -> Tensor:
    """A random blur and random noise, as a model that draws leaves them."""
    kernel = torch.tensor([1.0, 2.0, 1.0])
    kernel = (kernel[:, None] * kernel / 16).expand(3, 1, 3, 3)
    blurred = F.conv2d(F.pad(pictures, [1] * 4, mode="replicate"), kernel, groups=3)
    pictures = pictures.lerp(blurred, torch.rand(len(pictures), 1, 1, 1) * 1.3)
    return pictures + 0.06 * torch.rand(len(pictures), 1, 1, 1) * torch.randn_like(pictures)


def train(steps: int = 1200, batch: int = 128) -> Judge:
    from train_tiny import FASTER, optimizers

    torch.manual_seed(0)
    judge, generator = Judge().to(memory_format=torch.channels_last), torch.Generator().manual_seed(2)
    both = [(optimizer, optimizer.param_groups[0]["lr"]) for optimizer in optimizers(judge, 4e-3)]
    progress = tqdm(range(steps), "judge")
    for step in progress:
        wanted = scenes.draw(batch, generator)
        pictures = spoil(scenes.render(wanted))
        with FASTER:
            scores = judge(pictures)
        loss = sum(F.cross_entropy(scores[head], label) for head, label in labels(wanted).items())
        judge.zero_grad()
        loss.backward()
        for optimizer, peak in both:
            optimizer.param_groups[0]["lr"] = peak * min(1, (step + 1) / 50) * (1 - step / steps)
            optimizer.step()
        progress.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    return judge.eval()


def load() -> Judge:
    judge = Judge()
    judge.load_state_dict(load_file(FILE))
    return judge.eval()


def accuracy(judge: Judge, n: int = 4000) -> dict[str, float]:
    """On renders that it was not trained on: the share that it reads right, question by question."""
    wanted = scenes.draw(n, torch.Generator().manual_seed(3))
    said, true = read(judge, scenes.render(wanted)), labels(wanted)
    return {head: (said[head] == true[head]).float().mean().item() for head in HEADS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1200)
    options = parser.parse_args()
    save_file({name: tensor.half().contiguous() for name, tensor in train(options.steps).state_dict().items()}, FILE)
    print({head: f"{share:.1%}" for head, share in accuracy(load()).items()})


if __name__ == "__main__":
    main()
