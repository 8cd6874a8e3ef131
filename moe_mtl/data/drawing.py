"""Predictions as pictures: what a model saw, and over it what it says.

Shapes: `H`, `W` height and width of the picture, `C` channels.
"""

import colorsys
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..tasks import Task
from .errors import DataError

if TYPE_CHECKING:
    from .vision_processor import VisionProcessor

# Anchors of viridis (van der Walt and Smith 2015, CC0): as light as the value is high, for colour-blind eyes too.
VIRIDIS = np.frombuffer(
    bytes.fromhex("440154 472d7b 3b528b 2c728e 21918c 28ae80 5ec962 addc30 fde725"), np.uint8
).reshape(-1, 3)
EDGE = (16, 16, 24)
PALE = 0.2  # of a photograph's contrast, under edges
SALIENT = (255, 176, 0)
OPACITY = 0.6
FONT, MARGIN = 13, 6  # pixels
MOST_NAMES = 16  # of classes in a legend


def draw(processor: "VisionProcessor", pixels_HWC: np.ndarray, task: Task, prediction: Any) -> Image.Image:
    """See `VisionProcessor.draw`; `pixels_HWC` is uint8 RGB."""
    if not task.dense:
        return _with_text(Image.fromarray(pixels_HWC), _told(processor, task, prediction))
    map_ = _fitted(processor, pixels_HWC.shape[:2], task, np.asarray(prediction))
    photograph_HWC = pixels_HWC.astype(np.float32)
    if task.kind == "segmentation":
        colours = np.array([class_colour(i) for i in range(task.num_outputs)], np.float32)
        drawn = _blend(photograph_HWC, colours[np.maximum(map_, 0)], OPACITY * (map_ >= 0))
        return _with_classes(_picture(drawn), processor.class_names(task.name), map_)
    if task.kind == "normals":
        return _picture(_blend(photograph_HWC, (map_.transpose(1, 2, 0) + 1) * 127.5, ~np.isnan(map_).any(0)))
    known = ~np.isnan(map_)
    if task.kind == "depth":
        low, high = (float(map_[known].min()), float(map_[known].max())) if known.any() else (0.0, 0.0)
        drawn = _blend(photograph_HWC, viridis((map_ - low) / max(high - low, 1e-12)), known)
        return _with_scale(_picture(drawn), low, high, processor.units.get(task.name, ""))
    share = np.where(known, map_, 0)
    if task.kind == "edges":
        return _picture(_blend(_pale(photograph_HWC), np.array(EDGE), _lines(share)))
    return _picture(_blend(photograph_HWC, np.array(SALIENT), OPACITY * share))


def class_colour(number: int) -> tuple[int, int, int]:
    """RGB of a class: the same in every picture, and far from its neighbours'."""
    hue = (0.58 + number * 0.455) % 1
    red, green, blue = colorsys.hsv_to_rgb(hue, (0.9, 0.45)[number // 2 % 2], (0.95, 0.55)[number % 2])
    return round(255 * red), round(255 * green), round(255 * blue)


def viridis(values: np.ndarray) -> np.ndarray:
    """Values in [0, 1], of any shape -> RGB in [0, 255], one axis more; black where NaN."""
    at = np.linspace(0, 1, len(VIRIDIS))
    colours = np.stack([np.interp(values, at, channel) for channel in VIRIDIS.T], -1)
    return np.nan_to_num(colours)


def _fitted(processor: "VisionProcessor", size: tuple[int, ...], task: Task, map_: np.ndarray) -> np.ndarray:
    """A map of the picture's own size, from one of that size or of the model's input."""
    inputs = tuple(processor.image_size)
    shapes = [(3, *of) if task.kind == "normals" else of for of in (size, inputs)]
    if map_.shape not in shapes:
        expected = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise DataError(f"prediction of task {task.name!r}: expected the shape {expected}, found {list(map_.shape)}")
    if task.kind == "segmentation":
        if map_.dtype.kind not in "iu" or map_.max() >= task.num_outputs:
            raise DataError(
                f"prediction of task {task.name!r}: expected class numbers below {task.num_outputs}, found "
                f"{map_.dtype} to {map_.max()}"
            )
    elif map_.dtype.kind != "f":
        raise DataError(f"prediction of task {task.name!r}: expected numbers with a fraction, found {map_.dtype}")
    if map_.shape == shapes[0]:
        return map_
    at = processor.placement(*size)
    map_ = map_[..., at.top : at.top + at.height, at.left : at.left + at.width]
    smooth = map_.dtype.kind == "f" and not np.isnan(map_).any()
    if map_.ndim == 2:
        return _resized(map_, size, smooth)
    return np.stack([_resized(channel, size, smooth) for channel in map_])


def _resized(map_HW: np.ndarray, size: tuple[int, ...], smooth: bool) -> np.ndarray:
    method = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    number = np.float32 if map_HW.dtype.kind == "f" else np.int32
    return np.array(Image.fromarray(map_HW.astype(number)).resize((size[1], size[0]), method))


def _told(processor: "VisionProcessor", task: Task, prediction: Any) -> list[str]:
    """A line of a class or of values, or a line for each label with its probability, the likeliest first."""
    values = np.asarray(prediction).ravel()
    expected = 1 if task.kind == "multiclass" else task.num_outputs
    if len(values) != expected:
        what = "one class or value" if expected == 1 else f"{expected} values"
        raise DataError(f"prediction of task {task.name!r}: expected {what}, found {prediction!r:.80}")
    texts = [f"{float(value):.3g}" if values.dtype.kind == "f" else str(value) for value in values]
    if task.kind == "multilabel":
        likeliest = np.argsort(-values, kind="stable").tolist()
        names = processor.class_names(task.name)
        lines = [f"{task.name}/{names[i]}: {texts[i]}" for i in likeliest[:MOST_NAMES]]
        return lines + [f"and {expected - MOST_NAMES} more"] * (expected > MOST_NAMES)
    return [f"{task.name}: {', '.join(texts)} {processor.units.get(task.name, '')}".strip()]


def _pale(photograph_HWC: np.ndarray) -> np.ndarray:
    """In light grey, so that what is drawn in dark stands out everywhere."""
    return np.repeat(255 - PALE * (255 - photograph_HWC.mean(-1, keepdims=True)), 3, -1)


def _lines(share_HW: np.ndarray) -> np.ndarray:
    """Opacity of edges: along ridges one pixel wide, from none where an edge is as likely as not to full where sure.

    A map itself would show little: the loss weighs edges so much that most of a textured surface is likely.
    """
    from .ridges import non_maximum_suppression

    return np.maximum(2 * non_maximum_suppression(share_HW[None])[0] - 1, 0)


def _blend(photograph_HWC: np.ndarray, over: np.ndarray, opacity_HW: np.ndarray) -> np.ndarray:
    opacity = opacity_HW.astype(np.float32)[:, :, None]
    return photograph_HWC * (1 - opacity) + np.nan_to_num(over) * opacity


def _picture(drawn_HWC: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(np.round(drawn_HWC), 0, 255).astype(np.uint8))


# --- legends, below the picture ---


def _with_text(picture: Image.Image, lines: list[str]) -> Image.Image:
    font = ImageFont.load_default(FONT)
    width = max([picture.width, *(int(font.getlength(line)) + 2 * MARGIN for line in lines)])
    canvas, top = _enlarged(picture, width, MARGIN + len(lines) * (FONT + MARGIN))
    for number, line in enumerate(lines):
        ImageDraw.Draw(canvas).text((MARGIN, top + MARGIN / 2 + number * (FONT + MARGIN)), line, "black", font)
    return canvas


def _with_classes(picture: Image.Image, names: tuple[str, ...], map_HW: np.ndarray) -> Image.Image:
    """A patch of colour and a name for each class in the picture, the largest first."""
    counts = np.bincount(map_HW[map_HW >= 0].ravel(), minlength=len(names))
    shown = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]
    entries = [(class_colour(i), names[i]) for i in shown[:MOST_NAMES]]
    if len(shown) > MOST_NAMES:
        entries.append(((255, 255, 255), f"and {len(shown) - MOST_NAMES} more"))
    font = ImageFont.load_default(FONT)
    widths = [FONT + int(font.getlength(name)) + 3 * MARGIN for _, name in entries]
    width = max([picture.width, *widths])
    places, x, row = [], 0, 0
    for needed in widths:
        if x and x + needed > width:
            x, row = 0, row + 1
        places.append((x, row))
        x += needed
    canvas, top = _enlarged(picture, width, MARGIN + (row + 1) * (FONT + MARGIN))
    pen = ImageDraw.Draw(canvas)
    for (colour, name), (x, row) in zip(entries, places, strict=True):
        y = top + MARGIN + row * (FONT + MARGIN)
        pen.rectangle((x + MARGIN, y, x + MARGIN + FONT - 2, y + FONT - 2), fill=colour)
        pen.text((x + 2 * MARGIN + FONT - 2, y - 2), name, "black", font)
    return canvas


def _with_scale(picture: Image.Image, low: float, high: float, unit: str) -> Image.Image:
    """The colours from the lowest to the highest value, and what these are."""
    font = ImageFont.load_default(FONT)
    left, right = f"{low:.3g}", f"{high:.3g} {f'({unit})' if unit else ''}".strip()
    ends = [int(font.getlength(text)) + 2 * MARGIN for text in (left, right)]
    width = max(picture.width, sum(ends) + 4 * FONT)
    canvas, top = _enlarged(picture, width, FONT + 2 * MARGIN)
    length = width - sum(ends)
    bar = np.repeat(viridis(np.linspace(0, 1, length))[None], FONT - 2, 0)
    canvas.paste(_picture(bar), (ends[0], top + MARGIN))
    pen = ImageDraw.Draw(canvas)
    pen.text((MARGIN, top + MARGIN - 2), left, "black", font)
    pen.text((ends[0] + length + MARGIN, top + MARGIN - 2), right, "black", font)
    return canvas


def _enlarged(picture: Image.Image, width: int, strip: int) -> tuple[Image.Image, int]:
    """The picture at the top left of a white canvas with a strip below, and where that begins."""
    canvas = Image.new("RGB", (width, picture.height + strip), "white")
    canvas.paste(picture)
    return canvas, picture.height
