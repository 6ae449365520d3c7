"""Renders the emoji of EMOJI in four styles, flat.png, glossy.png, detailed.png and inked.png, and names.txt.

Each is a sheet in 256 colours: 16 cells a row, 64x64 each, in the order of names.txt. The names are Unicode CLDR short
names, the long ones shortened ("hot beverage" is a coffee). Run once; the sheets are committed, so nobody needs the
network to train or to evaluate. To make them again, in an empty folder:

    npm pack @iconify-json/twemoji@1.2.5 @iconify-json/fluent-emoji@1.2.7 @iconify-json/noto@1.2.9 \
        @iconify-json/fluent-emoji-high-contrast@1.2.6 @iconify-json/fluent-emoji-flat@1.2.6
    pip install resvg-py scipy
    python make_styles.py .

Sources: Twemoji (Twitter and contributors, CC BY 4.0), Fluent Emoji, in colour and in high contrast (Microsoft, MIT),
Noto Emoji (Google, Apache-2.0).
"""

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image, ImageFilter
from scipy.ndimage import binary_fill_holes

SIZE, COLUMNS = 64, 16
INK = 58  # the longer side of each picture inside its cell
PACKAGES = {
    "flat": "twemoji",
    "glossy": "fluent-emoji",
    "detailed": "noto",
    "inked": "fluent-emoji-high-contrast",
}

EMOJI = """
🦊 fox · 🐻 bear · 🐼 panda · 🐨 koala · 🦁 lion · 🐸 frog · 🐵 monkey · 🐔 chicken · 🐧 penguin · 🦉 owl · 🦇 bat
🐺 wolf · 🦄 unicorn · 🐝 bee · 🦋 butterfly · 🐌 snail · 🐞 ladybug · 🕷 spider · 🦂 scorpion · 🐢 turtle · 🐍 snake
🦖 dinosaur · 🐙 octopus · 🦑 squid · 🦐 shrimp · 🦀 crab · 🐠 tropical fish · 🐬 dolphin · 🐳 whale · 🦈 shark
🐊 crocodile · 🐅 tiger · 🦓 zebra · 🦍 gorilla · 🐘 elephant · 🐪 camel · 🦒 giraffe · 🐄 cow · 🐖 pig · 🐑 sheep
🦌 deer · 🐕 dog · 🐈 cat · 🐰 rabbit · 🐭 mouse · 🦔 hedgehog · 🦆 duck · 🦅 eagle · 🐤 chick · 🦜 parrot
🦩 flamingo · 🕊 dove · 🌵 cactus · 🎄 christmas tree · 🌴 palm tree · 🍄 mushroom · 🌹 rose · 🌻 sunflower
🌷 tulip · 🍁 maple leaf · 🍎 red apple · 🍏 green apple · 🍐 pear · 🍊 tangerine · 🍋 lemon · 🍌 banana
🍉 watermelon · 🍇 grapes · 🍓 strawberry · 🍒 cherries · 🍑 peach · 🍍 pineapple · 🥥 coconut · 🥝 kiwi · 🍅 tomato
🍆 eggplant · 🥑 avocado · 🥦 broccoli · 🌽 corn · 🥕 carrot · 🥐 croissant · 🍞 bread · 🥨 pretzel · 🧀 cheese
🍳 fried egg · 🥓 bacon · 🌭 hot dog · 🍔 hamburger · 🍟 french fries · 🍕 pizza · 🌮 taco · 🍣 sushi · 🍩 doughnut
🍪 cookie · 🎂 birthday cake · 🧁 cupcake · 🍭 lollipop · 🍦 ice cream · 🍿 popcorn · ☕ coffee · 🍺 beer · 🚗 car
🚌 bus · 🚒 fire engine · 🚜 tractor · 🚲 bicycle · 🚂 locomotive · ✈ airplane · 🚀 rocket · 🛸 flying saucer
🚁 helicopter · ⛵ sailboat · ⚓ anchor · ⚽ soccer ball · 🏀 basketball · 🎸 guitar · 🎺 trumpet · 🎻 violin
🥁 drum · 🎨 palette · 🎲 die · 🎁 gift · 🎈 balloon · 🔔 bell · 🔑 key · 🔒 padlock · 🔨 hammer · ✂ scissors
💡 light bulb · 📷 camera · 📺 television · ☎ telephone · 💻 laptop · ⏰ alarm clock · ☂ umbrella · 👑 crown
🎩 top hat · 👓 glasses · 👟 shoe · 👗 dress · 🎒 backpack · 💎 diamond · 🏆 trophy · 🔬 microscope · 🧸 teddy bear
🎃 pumpkin · 👻 ghost · 💀 skull · 🤖 robot · 👽 alien · ⛄ snowman · 🔥 fire · 🌈 rainbow · ⭐ star · 🌙 moon · ☀ sun
☁ cloud · ❤ heart · 🏠 house · ⛺ tent
"""


def read(folder: Path, package: str, name: str) -> dict:
    """A JSON file out of the package's archive."""
    archives = [file for file in folder.glob("iconify-json-*.tgz") if file.name[13:].rpartition("-")[0] == package]
    with tarfile.open(archives[0]) as archive:
        return json.load(archive.extractfile(f"package/{name}"))


def picture(icons: dict, name: str) -> Image.Image:
    """An icon as RGBA, its longer side INK, drawn large first so that its edges are smooth."""
    name = icons.get("aliases", {}).get(name, {}).get("parent", name)
    icon = {"left": 0, "top": 0, "width": icons["width"], "height": icons["height"], **icons["icons"][name]}
    box = " ".join(str(icon[key]) for key in ("left", "top", "width", "height"))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}"'
        f' width="256" height="256">{icon["body"]}</svg>'
    )
    drawn = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")
    drawn = drawn.crop(drawn.getbbox())
    scale = INK / max(drawn.size)
    return drawn.resize([max(1, round(side * scale)) for side in drawn.size], Image.Resampling.LANCZOS)


def on_paper(cell: Image.Image) -> Image.Image:
    """Ink alone can't be seen on black: white inside, and a white rim around it."""
    alpha = np.asarray(cell.getchannel("A"))
    inside = Image.fromarray((binary_fill_holes(alpha > 100) * 255).astype(np.uint8))
    paper = inside.filter(ImageFilter.MaxFilter(5)).filter(ImageFilter.GaussianBlur(0.6))
    white = Image.new("RGBA", cell.size, "white")
    white.putalpha(paper)
    white.alpha_composite(cell)
    return white


def main(packages: str) -> None:
    entries = [entry.split(maxsplit=1) for line in EMOJI.strip().splitlines() for entry in line.split(" · ")]
    characters, emoji = zip(*entries, strict=True)
    Path(__file__).with_name("names.txt").write_text("\n".join(emoji) + "\n")
    for style, package in PACKAGES.items():
        icons = read(Path(packages), package, "icons.json")
        # Fluent Emoji in colour lists no code points; its names are those of the flat package
        names = read(Path(packages), "fluent-emoji-flat" if style == "glossy" else package, "chars.json")
        sheet = Image.new("RGBA", (COLUMNS * SIZE, -(-len(characters) // COLUMNS) * SIZE))
        for index, character in enumerate(characters):
            code = f"{ord(character):x}"
            drawn = picture(icons, names.get(code) or names[f"{code}-fe0f"])
            cell = Image.new("RGBA", (SIZE, SIZE))
            cell.paste(drawn, ((SIZE - drawn.width) // 2, (SIZE - drawn.height) // 2))
            cell = on_paper(cell) if style == "inked" else cell
            sheet.paste(cell, (index % COLUMNS * SIZE, index // COLUMNS * SIZE))
        sheet.quantize(256, method=Image.Quantize.FASTOCTREE).save(
            Path(__file__).parent / f"{style}.png", optimize=True
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
