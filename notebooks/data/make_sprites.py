"""Renders the emoji of EMOJI, in order, into sprites.png (RGBA, 16 a row, 64x64 each) and their names into names.txt.

Run once; both results are committed, so nobody needs the font to train or to evaluate. The font is Noto Color Emoji
(Debian: fonts-noto-color-emoji 2.042; SIL Open Font License 1.1), the names are Unicode CLDR short names, the long
ones shortened ("hot beverage" is a coffee).
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIZE, COLUMNS = 64, 16
INK = 58  # the picture's width inside its cell: a border of background stays visible on all sides

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


def main(font_file: str = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf") -> None:
    entries = [entry.split(maxsplit=1) for line in EMOJI.strip().splitlines() for entry in line.split(" · ")]
    font = ImageFont.truetype(font_file, 109)  # the one size of the font's bitmaps, which are 136x128
    sheet = Image.new("RGBA", (COLUMNS * SIZE, -(-len(entries) // COLUMNS) * SIZE))
    for index, (character, _) in enumerate(entries):
        canvas = Image.new("RGBA", (136, 136))
        ImageDraw.Draw(canvas).text((68, 68), character, font=font, embedded_color=True, anchor="mm")
        box = canvas.getbbox()
        glyph = canvas.crop(box)
        scale = INK / 136
        glyph = glyph.resize([max(1, round(side * scale)) for side in glyph.size], Image.Resampling.LANCZOS)
        corner = ((SIZE - glyph.width) // 2, (SIZE - glyph.height) // 2)
        sheet.paste(glyph, (index % COLUMNS * SIZE + corner[0], index // COLUMNS * SIZE + corner[1]))
    folder = Path(__file__).parent
    sheet.save(folder / "sprites.png", optimize=True)
    (folder / "names.txt").write_text("\n".join(name for _, name in entries) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
