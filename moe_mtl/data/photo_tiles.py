"""Photo tiles: five maps of real photographs, as shipped with scikit-image and scikit-learn; nothing to download.

Photographs are dealt to the parts whole, so that every tested tile is of a picture that training has not seen; but the
motorcycle, the one with a measurement (its disparity), is cut into regions with a margin between them. Each part has
things, textures and something seen through an instrument:

- train: astronaut, china, retina, hubble_deep_field, camera, cell, brick, grass, the motorcycle's left half;
- validation: flower, moon, gravel, the motorcycle's middle;
- test: chelsea, rocket, coffee, immunohistochemistry, coins, the motorcycle's right quarter.

Labels come from the whole clean photograph, before it is cut, so that a tile's border is nothing special; the model is
given a blurred tile with noise, or Sobel filters would answer:

- `edges`: Canny (1986) of the luminance, thresholds equal for all photographs; lines of one pixel.
- `segments`: the nearest of four colours in CIELAB (k-means on the training photographs, see `COLOURS`), smoothed.
- `normals`: of the surface whose height is the smoothed luminance: x to the right, y down, z to the camera. No true
  normals, but as curved.
- `distance`: to the nearest edge, at most 20 pixels, in tens of pixels.
- `disparity`: measured, in tens of pixels; only of the motorcycle (Scharstein et al., High-Resolution Stereo Datasets
  with Subpixel-Accurate Ground Truth, GCPR 2014), and there not everywhere.

Shapes: `N` tiles, `H`, `W` height and width of a photograph or tile in pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..tasks import Task
from .augmentation import Augmentation
from .errors import DataError, check_int
from .images import ImageSplits, TensorImages, check_tasks, rows_of
from .splits import content_hash, row_hash
from .vision_processor import VisionProcessor

# Weights of the field (ASTMT, InvPT).
TASKS = {
    "edges": Task("edges", "edges", weight=50.0),
    "segments": Task("segments", "segmentation", 4),
    "normals": Task("normals", "normals", 3, weight=10.0),
    "distance": Task("distance", "depth"),
    "disparity": Task("disparity", "depth"),
}
PHOTOGRAPHS = {
    "train": ("astronaut", "china", "retina", "hubble_deep_field", "camera", "cell", "brick", "grass"),
    "validation": ("flower", "moon", "gravel"),
    "test": ("chelsea", "rocket", "coffee", "immunohistochemistry", "coins"),
}
# Columns of the motorcycle, 741 wide. Labels look no further than 20 pixels, so that none sees into the next region.
MOTORCYCLE = {"train": (0, 384), "validation": (404, 532), "test": (552, 741)}
# Centres of k-means in CIELAB over the training photographs, rounded.
COLOURS = {"dark": (8, 1, 1), "medium": (39, 2, 3), "bright": (73, 1, 0), "warm": (54, 49, 41)}
LARGEST = 640  # pixels a side; of a larger photograph the middle is used
UNIT = 10  # pixels
FURTHEST = 20  # pixels
SMOOTH = 2.0  # standard deviation, pixels
SLOPE = 20.0  # height of full luminance, pixels
EDGES = (0.08, 0.16)  # Canny's thresholds, of the gradient of luminance in [0, 1]


@dataclass(frozen=True)
class Options:
    """Options of the photo tiles.

    Attributes:
        tasks: which of edges, segments, normals, distance, disparity.
        size: pixels a side of a tile.
        stride: pixels from one training tile to the next; the others do not overlap.
        max_tiles: the most tiles of one photograph in a part, so that none dominates.
        noise: standard deviation of what is added to colours in [0, 1]; fixed for each tile, but new in each epoch of
            training with `augment`.
        blur: standard deviation of the blur, in pixels.
        augment: mirror, flip and turn training tiles, and change their brightness and contrast a little.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    size: int = 64
    stride: int = 32
    max_tiles: int = 96
    noise: float = 0.1
    blur: float = 1.0
    augment: bool = True


def load(options: Options) -> ImageSplits:
    """Tiles of 16 photographs and of three regions of the motorcycle.

    Raises:
        DataError: an unknown task, an option out of its range, scikit-image is not installed.
    """
    tasks = check_tasks("photo-tiles", options.tasks, list(TASKS))
    check_int(options.size, 16, 128, "photo-tiles: size")
    check_int(options.stride, 1, options.size, "photo-tiles: stride")
    check_int(options.max_tiles, 1, 100_000, "photo-tiles: max_tiles")
    for name, most in (("noise", 1), ("blur", 10)):
        if not 0 <= getattr(options, name) <= most:
            raise DataError(f"photo-tiles: {name}: expected 0 to {most}, found {getattr(options, name)}")
    size = [options.size, options.size]
    units = {name: "tens of pixels" for name in tasks if TASKS[name].kind == "depth"}
    classes = {"segments": list(COLOURS)} if "segments" in tasks else {}
    processor = VisionProcessor(size, [TASKS[task] for task in tasks], classes, units)
    augmentation = (
        Augmentation(mirror=True, flip=True, turn=True, brightness=0.05, contrast=0.05, noise=options.noise)
        if options.augment
        else None
    )
    motorcycle = _motorcycle()
    parts, content = {}, []
    for number, (part, names) in enumerate(PHOTOGRAPHS.items()):
        tiles = [_tiles(_photograph(name), options, part == "train") for name in names]
        columns = slice(*MOTORCYCLE[part])
        region = {key: v[:, columns] if key == "pixels" else v[..., columns] for key, v in motorcycle.items()}
        tiles.append(_tiles(region, options, part == "train"))
        groups_N = torch.arange(len(tiles)).repeat_interleave(torch.tensor([len(one["pixels"]) for one in tiles]))
        joined = {key: np.concatenate([one[key] for one in tiles]) for key in tiles[0]}
        clean = joined.pop("pixels")
        pixels = _noisy(clean, options.noise, number)
        content += [pixels, *(_rounded(joined[task]) for task in TASKS)]
        labels = {task: torch.from_numpy(joined[task]) for task in tasks}
        # Training begins with the tile before the noise, and draws its own.
        changes, start = (augmentation, torch.from_numpy(clean)) if part == "train" else (None, None)
        parts[part] = TensorImages(torch.from_numpy(pixels), labels, processor, changes, start, groups_N=groups_N)
    info = {
        "name": "photo-tiles",
        "licence": "public domain, CC0-1.0 or no known restrictions; china, flower: CC-BY-2.0; motorcycle: Middlebury",
        "sha256": content_hash(*content),
        "rows": rows_of(parts),
    }
    return ImageSplits(**parts, tasks=processor.parsed_tasks, processor=processor, info=info)


def labels_of(pixels_HWC: np.ndarray) -> dict[str, np.ndarray]:
    """The label maps of a photograph, uint8 RGB, but for the measured one: `[H, W]`, normals `[3, H, W]`."""
    from scipy import ndimage
    from skimage import color, feature

    rgb = pixels_HWC / 255.0
    light = color.rgb2gray(rgb)
    edges = feature.canny(light, sigma=SMOOTH, low_threshold=EDGES[0], high_threshold=EDGES[1])
    lab = ndimage.gaussian_filter(color.rgb2lab(rgb), (SMOOTH, SMOOTH, 0))
    centres = np.array(list(COLOURS.values()), np.float64)
    segments = (np.square(centres).sum(1) - 2 * lab @ centres.T).argmin(-1)  # the square of lab is equal for all
    slope_x, slope_y = (SLOPE * ndimage.gaussian_filter(light, SMOOTH, order=order) for order in ((0, 1), (1, 0)))
    normals = np.stack([-slope_x, -slope_y, np.ones_like(light)])
    distance = ndimage.distance_transform_edt(~edges) if edges.any() else np.full(light.shape, np.inf)
    return {
        "edges": edges.astype(np.float32),
        "segments": segments.astype(np.int64),
        "normals": (normals / np.linalg.norm(normals, axis=0)).astype(np.float32),
        "distance": (np.minimum(distance, FURTHEST) / UNIT).astype(np.float32),
        "disparity": np.full(light.shape, np.nan, np.float32),
    }


def _photograph(name: str) -> dict[str, np.ndarray]:
    """`pixels`, uint8 RGB `[H, W, 3]`, and the label maps."""
    if name in ("china", "flower"):
        from sklearn.datasets import load_sample_image

        pixels = load_sample_image(f"{name}.jpg")
    else:
        pixels = getattr(_shipped(), name)()
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[:, :, None], 3, 2)
    top, left = (max(0, side - LARGEST) // 2 for side in pixels.shape[:2])
    pixels = pixels[top : top + LARGEST, left : left + LARGEST]
    return {"pixels": pixels} | labels_of(pixels)


def _motorcycle() -> dict[str, np.ndarray]:
    """The left picture of the pair, with the measured disparity."""
    pixels, _, disparity = _shipped().stereo_motorcycle()
    measured = np.where(np.isfinite(disparity), disparity / UNIT, np.nan).astype(np.float32)
    return {"pixels": pixels} | labels_of(pixels) | {"disparity": measured}


def _shipped() -> Any:
    try:
        from skimage import data
    except ImportError:
        raise DataError("photo-tiles needs scikit-image: pip install 'moe_mtl[vision]'") from None
    return data


def _tiles(photograph: Mapping[str, np.ndarray], options: Options, train: bool) -> dict[str, np.ndarray]:
    """Tiles of one photograph, `pixels` blurred; where there are more than `max_tiles`, a choice spread by a hash."""
    from scipy import ndimage

    size, (height, width) = options.size, photograph["pixels"].shape[:2]
    step = options.stride if train else size
    corners = [(y, x) for y in range(0, height - size + 1, step) for x in range(0, width - size + 1, step)]
    chosen = np.sort(np.argsort(row_hash(np.arange(len(corners))), kind="stable")[: options.max_tiles])
    maps = {name: values for name, values in photograph.items() if name != "pixels"}
    blurred = ndimage.gaussian_filter(photograph["pixels"].astype(np.float64), (options.blur, options.blur, 0))
    maps["pixels"] = np.round(blurred).astype(np.uint8).transpose(2, 0, 1)
    where = [(..., slice(y, y + size), slice(x, x + size)) for y, x in (corners[i] for i in chosen)]
    return {name: np.stack([values[at] for at in where]) for name, values in maps.items()}


def _noisy(clean_N3HW: np.ndarray, noise: float, seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).standard_normal(clean_N3HW.shape, np.float32)
    return np.clip(np.round(clean_N3HW + 255 * noise * drawn), 0, 255).astype(np.uint8)


def _rounded(label: np.ndarray) -> np.ndarray:
    """For the hash: to thousandths, so that a last bit that differs between machines does not count."""
    return np.round(np.nan_to_num(label, nan=-1.0) * 1000).astype(np.int32)
