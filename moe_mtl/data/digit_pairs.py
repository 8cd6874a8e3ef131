"""Digit pairs: two overlaid scanned digits in one picture, two tasks that interfere; nothing to download.

After the MultiMNIST of Sener and Koltun, "Multi-Task Learning as Multi-Objective Optimization" (NeurIPS 2018, section
5.1): one digit at the top left, one at the bottom right, overlaid by the brighter pixel, and a task for each. Differs
from it in: the scans are the 1,797 of 8 x 8 pixels that ship with scikit-learn (see `digits`), which are dealt to the
parts before they are paired.
"""

from dataclasses import dataclass

import numpy as np
import torch

from ..tasks import Task
from .digits import stratified
from .errors import check_int
from .images import ImageSplits, TensorImages, check_tasks, rows_of
from .splits import content_hash, row_hash
from .vision_processor import VisionProcessor

TASKS = {"left": Task("left", "multiclass", 10), "right": Task("right", "multiclass", 10)}
PAIRS = {"train": 6000, "validation": 1000, "test": 2000}
SCAN = 8  # pixels a side


@dataclass(frozen=True)
class Options:
    """Options of the digit pairs.

    Attributes:
        tasks: which of left (the digit at the top left), right (at the bottom right).
        canvas: pixels a side of what holds both digits, 8 to 16: the smaller, the more they overlap. On 9, where 7 x 7
            pixels overlap, a logistic regression gets five of six digits right; on 12 nearly all.
        size: pixels a side of the picture: the canvas, enlarged by whole pixels as often as it fits, on black.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    canvas: int = 9
    size: int = 12


def load(options: Options) -> ImageSplits:
    """6,000, 1,000 and 2,000 pairs of 60 / 20 / 20 % of the scans, stratified by digit and drawn by a hash.

    Raises:
        DataError: an unknown task, a canvas out of its range, a picture smaller than the canvas.
    """
    from sklearn.datasets import load_digits

    tasks = check_tasks("digit-pairs", options.tasks, list(TASKS))
    check_int(options.canvas, SCAN, 2 * SCAN, "digit-pairs: canvas")
    check_int(options.size, options.canvas, 1024, "digit-pairs: size")
    scans, digit = load_digits(return_X_y=True)
    scans_NHW = np.round(scans * (255 / 16)).astype(np.uint8).reshape(-1, SCAN, SCAN)
    digit = digit.astype(np.int64)
    names = [str(i) for i in range(10)]
    processor = VisionProcessor(
        [options.size, options.size], [TASKS[task] for task in tasks], dict.fromkeys(tasks, names)
    )
    part, parts, content = stratified(digit), {}, []
    for number, (name, pairs) in enumerate(PAIRS.items()):
        sources = np.flatnonzero(part == number)
        left, right = (sources[(row_hash(np.arange(pairs), 2 * number + i) % len(sources)).astype(int)] for i in (0, 1))
        pictures = _overlaid(scans_NHW[left], scans_NHW[right], options.canvas, options.size)
        labels = {"left": digit[left], "right": digit[right]}
        content += [pictures, *labels.values()]
        pixels = torch.from_numpy(pictures)[:, None].expand(-1, 3, -1, -1).contiguous()
        parts[name] = TensorImages(pixels, {task: torch.from_numpy(labels[task]) for task in tasks}, processor)
    info = {"name": "digit-pairs", "licence": "CC-BY-4.0", "sha256": content_hash(*content), "rows": rows_of(parts)}
    return ImageSplits(**parts, tasks=processor.parsed_tasks, processor=processor, info=info)


def _overlaid(left_NHW: np.ndarray, right_NHW: np.ndarray, canvas: int, size: int) -> np.ndarray:
    """uint8 `[N, size, size]`: the first scans at the top left, the second at the bottom right."""
    pairs = np.zeros((len(left_NHW), canvas, canvas), np.uint8)
    pairs[:, :SCAN, :SCAN] = left_NHW
    pairs[:, -SCAN:, -SCAN:] = np.maximum(pairs[:, -SCAN:, -SCAN:], right_NHW)
    times = size // canvas
    before = (size - canvas * times) // 2
    after = size - canvas * times - before
    return np.pad(pairs.repeat(times, 1).repeat(times, 2), ((0, 0), (before, after), (before, after)))
