"""Makes a folder of pictures to train on: `python make_letters.py DIR` draws letters in matplotlib's fonts.

26 letters in six faces and three colours, each with its prompt in metadata.jsonl: "a bold serif q in red".
"""

import json
import sys
from pathlib import Path

from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

FACES = {
    "sans": "DejaVuSans",
    "bold sans": "DejaVuSans-Bold",
    "serif": "DejaVuSerif",
    "bold serif": "DejaVuSerif-Bold",
    "italic serif": "DejaVuSerif-Italic",
    "mono": "DejaVuSansMono",
}


def main(folder: str) -> None:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for face, file in FACES.items():
        font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/{file}.ttf", 52)
        for letter in "abcdefghijklmnopqrstuvwxyz":
            for colour in ("black", "red", "blue"):
                picture = Image.new("RGB", (64, 64), "white")
                ImageDraw.Draw(picture).text((32, 46), letter, font=font, fill=colour, anchor="ms")
                name = f"{face} {letter} {colour}.png"
                picture.save(folder / name)
                lines.append(json.dumps({"file_name": name, "text": f"a {face} {letter} in {colour}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
