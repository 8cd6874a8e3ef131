"""Changes to training pictures that leave their labels true, by kornia.

Shapes: `B` pictures of a batch, `C` channels, `H`, `W` height and width in pixels.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..tasks import Task
from .errors import DataError

if TYPE_CHECKING:
    from kornia.augmentation import AugmentationSequential


@dataclass(frozen=True)
class Augmentation:
    """Random changes to each picture of a batch; label maps follow, normals as the vectors they are.

    Attributes:
        mirror: left and right are exchanged, in half of the pictures.
        flip: top and bottom are, in half of them.
        turn: by 0, 90, 180 or 270 degrees; pictures must be square.
        scale: lowest and highest enlargement, about a point near the middle; what lies outside is black, without a
            label. Depth is divided by it, as if the camera had come nearer (ASTMT).
        brightness: at most so much is added to or taken from values in [0, 1].
        contrast: values are multiplied by 1 plus or minus at most so much.
        noise: standard deviation of what is added to each value at last.
    """

    mirror: bool = False
    flip: bool = False
    turn: bool = False
    scale: tuple[float, float] | None = None
    brightness: float = 0.0
    contrast: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        if importlib.util.find_spec("kornia") is None:
            raise DataError("augmentation needs kornia: pip install 'moe_mtl[vision]'")

    def __call__(
        self, pixels_BCHW: Tensor, labels: Mapping[str, Tensor], tasks: Sequence[Task], seed: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Pixels in [0, 1] and labels, changed; the same for the same seed.

        Raises:
            DataError: pictures that are to be turned and are not square.
        """
        if self.turn and pixels_BCHW.shape[-1] != pixels_BCHW.shape[-2]:
            raise DataError(f"expected square pictures to turn, found {list(pixels_BCHW.shape[-2:])}")
        # kornia draws from the generator that dropout uses too: it is put back as it was.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            pixels_BCHW, labels = _changed(_pipeline(self), pixels_BCHW, labels, tasks)
            if self.noise:
                pixels_BCHW = (pixels_BCHW + self.noise * torch.randn(pixels_BCHW.shape)).clamp(0, 1)
        return pixels_BCHW, labels


@cache
def _pipeline(changes: Augmentation) -> "AugmentationSequential | None":
    from kornia import augmentation as kornia

    steps: list[Any] = []
    if changes.mirror:
        steps.append(kornia.RandomHorizontalFlip(p=0.5))
    if changes.flip:
        steps.append(kornia.RandomVerticalFlip(p=0.5))
    if changes.turn:
        steps.append(kornia.RandomRotation90(times=(0, 3), p=1.0))
    if changes.scale is not None:
        steps.append(kornia.RandomAffine(degrees=0.0, translate=(0.25, 0.25), scale=changes.scale, p=1.0))
    if changes.brightness:
        steps.append(kornia.RandomBrightness((1 - changes.brightness, 1 + changes.brightness), p=1.0))
    if changes.contrast:
        steps.append(kornia.RandomContrast((1 - changes.contrast, 1 + changes.contrast), p=1.0))
    return kornia.AugmentationSequential(*steps, data_keys=["input", "mask"]) if steps else None


def _changed(
    pipeline: "AugmentationSequential | None",
    pixels_BCHW: Tensor,
    labels: Mapping[str, Tensor],
    tasks: Sequence[Task],
) -> tuple[Tensor, dict[str, Tensor]]:
    """All label maps take the way of the pictures as channels of one mask."""
    changed = dict(labels)
    if pipeline is None:
        return pixels_BCHW, changed
    dense = [task for task in tasks if task.dense and task.name in labels]
    # The first says what of the changed picture was in the old one.
    maps = [torch.ones_like(pixels_BCHW[:, :1])]
    maps += [labels[task.name].float().reshape(len(pixels_BCHW), -1, *pixels_BCHW.shape[-2:]) for task in dense]
    pixels_BCHW, moved_BCHW = pipeline(pixels_BCHW, torch.cat(maps, 1))
    inside_BHW, *moved = moved_BCHW.split([one.shape[1] for one in maps], 1)
    # x to the right and y down, as in the picture: the linear part of each picture's change, [B, 2, 2].
    change: Any = pipeline.transform_matrix
    change = torch.eye(2).expand(len(pixels_BCHW), 2, 2) if change is None else change[:, :2, :2]
    for task, values in zip(dense, moved, strict=True):
        if task.kind == "normals":
            turned = torch.einsum("bij,bjhw->bihw", change, values[:, :2])
            # A change of scale does not tilt a surface.
            scale = change.det().abs().sqrt().view(-1, 1, 1, 1)
            values = torch.cat([turned / scale, values[:, 2:]], 1)
        elif task.kind == "depth":
            values = values / change.det().abs().sqrt().view(-1, 1, 1, 1)
        old = labels[task.name]
        values = torch.where(inside_BHW > 0, values, task.missing).reshape(old.shape)
        changed[task.name] = values.round().to(old.dtype) if not old.dtype.is_floating_point else values
    return pixels_BCHW, changed
