"""Pictures of text for the OCR models: lines as a detector cuts them out, and pages.

Drawn with Pillow (``pip install pillow``; a requirement of this benchmark alone) in the fonts that are found
here: DejaVu of Debian or of matplotlib's wheel, else the one that Pillow brings. The same seed draws the same
pictures with the same fonts.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

PILLOW = importlib.util.find_spec("PIL") is not None
FONTS = (
    Path("/usr/share/fonts/truetype/dejavu"),
    *(
        [Path(found.origin).parent / "mpl-data/fonts/ttf"]
        if (found := importlib.util.find_spec("matplotlib")) is not None and found.origin
        else []
    ),
)
WORDS = """
pump valve bearing pressure temperature motor shift line station limit Warning ERROR Stop start open close
speed torque Level sensor filter flow rate Invoice total date amount due street number North batch lot
serial model type made in Net weight Keep dry This side up fragile Handle with care EXIT Danger high voltage
Please wait ready Machine oil change before use only after the and of for to is not was
""".split()  # noqa: SIM905


def lines(count: int, height: int, width: int, *, seed: int, turned: bool = False) -> np.ndarray:
    """One line of text in each, -1..1, padded with 0 at the right: (count, 3, height, width).

    Args:
        count: pictures.
        height: of each.
        width: of each; longer text is cut.
        seed: of words, fonts, colours, blur and noise.
        turned: every other one on its head.
    """
    from PIL import Image

    chance = np.random.default_rng(seed)
    made = np.zeros((count, 3, height, width), np.float32)
    for row in range(count):
        font = _font(chance, int(chance.integers(24, 44)))
        text = _words(chance, int(chance.integers(1, 4)))
        left, top, right, bottom = font.getbbox(text)
        margin = [int(chance.integers(1, 7)) for _ in range(4)]
        size = int(right - left) + margin[0] + margin[1], int(bottom - top) + margin[2] + margin[3]
        picture = _paper(chance, size[1], size[0])
        _write(chance, picture, (margin[0] - left, margin[2] - top), text, font)
        picture = _worn(chance, picture)
        wide = max(8, min(width, round(size[0] * height / size[1])))
        picture = picture.resize((wide, height), Image.Resampling.BILINEAR)
        found = np.asarray(picture, np.float32)
        if turned and row % 2:
            found = found[::-1, ::-1]
        made[row, :, :, :wide] = found.transpose(2, 0, 1) / 127.5 - 1
    return made


def pages(count: int, height: int, width: int, *, seed: int) -> np.ndarray:
    """Some lines of text at all places and sizes, normalised as ImageNet's: (count, 3, height, width)."""
    chance = np.random.default_rng(seed)
    made = np.empty((count, 3, height, width), np.float32)
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    for row in range(count):
        picture = _paper(chance, height, width)
        top = int(chance.integers(0, 20))
        while top < height - 10:
            size = int(chance.integers(9, 30))
            left = int(chance.integers(0, width // 2))
            _write(
                chance, picture, (left, top), _words(chance, int(chance.integers(1, 5))), _font(chance, size)
            )
            top += int(size * chance.uniform(1.2, 3))
        found = np.asarray(_worn(chance, picture), np.float64) / 255
        made[row] = ((found - mean) / deviation).transpose(2, 0, 1)
    return made


def _words(chance: np.random.Generator, count: int) -> str:
    found = []
    for _ in range(count):
        if chance.random() < 0.25:
            found.append(f"{chance.uniform(0, 10 ** chance.integers(1, 5)):.{int(chance.integers(0, 3))}f}")
        else:
            found.append(WORDS[int(chance.integers(len(WORDS)))])
    return " ".join(found)


def _font(chance: np.random.Generator, size: int) -> Any:
    from PIL import ImageFont

    files = sorted(path for folder in FONTS for path in folder.glob("DejaVuS*.ttf"))
    if not files:
        return ImageFont.load_default(size)
    return ImageFont.truetype(files[int(chance.integers(len(files)))], size)


def _paper(chance: np.random.Generator, height: int, width: int) -> Any:
    """A background of one colour that gets lighter or darker over its length."""
    from PIL import Image

    colour = chance.uniform(0, 255) + chance.normal(0, 15, 3)
    slope = chance.normal(0, 25, 2)
    y, x = np.mgrid[0:height, 0:width]
    shade = slope[0] * y / height + slope[1] * x / width
    return Image.fromarray(np.clip(colour + shade[:, :, None], 0, 255).astype(np.uint8))


def _write(
    chance: np.random.Generator, picture: Any, place: tuple[float, float], text: str, font: Any
) -> None:
    from PIL import ImageDraw

    behind = float(np.asarray(picture).mean())
    ink = behind + (1 if behind < 128 else -1) * chance.uniform(70, 200)
    colour = tuple(int(np.clip(ink + shade, 0, 255)) for shade in chance.normal(0, 20, 3))
    ImageDraw.Draw(picture).text(place, text, fill=colour, font=font)


def _worn(chance: np.random.Generator, picture: Any) -> Any:
    """A little turned, blurred and noisy, as a camera sees it."""
    from PIL import Image, ImageFilter

    around = tuple(int(shade) for shade in np.asarray(picture).reshape(-1, 3).mean(axis=0))
    picture = picture.rotate(float(chance.normal(0, 1)), Image.Resampling.BILINEAR, fillcolor=around)
    picture = picture.filter(ImageFilter.GaussianBlur(float(chance.uniform(0, 1.2))))
    noisy = np.asarray(picture, np.float64) + chance.normal(0, chance.uniform(0, 8), (*picture.size[::-1], 3))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
