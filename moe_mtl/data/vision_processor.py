"""From pictures to tensors and from logits to maps a person can read; fixed by the data set, saved beside the model.

Shapes: `B` pictures, `C` outputs of a task, `H`, `W` height and width of the model's input in pixels.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..tasks import Task, UnknownTaskError, check_task_names, parse_tasks
from .errors import DataError, check_choice, check_int, check_keys
from .saved import FILE, SavedProcessor

if TYPE_CHECKING:
    from transformers import ViTImageProcessorPil

VERSION = 1
TYPE = "moe_mtl_vision"
MAX_SIDE = 16_384  # pixels of a picture's longer side that are read
# Of ImageNet, by which most published backbones were trained.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Picture = Image.Image | np.ndarray | str | Path


class Placement(NamedTuple):
    """Where a picture lies in the model's input: pixels from `top` and `left`, `height` x `width` of them."""

    top: int
    left: int
    height: int
    width: int


class VisionProcessor(SavedProcessor):
    """Turns pictures into a model's tensors and its logits into maps and classes.

    Args:
        image_size: `[H, W]` of the model's input, in pixels.
        tasks: what the model predicts.
        classes: task -> names of its classes, in the order of their numbers; by default the numbers.
        units: task -> unit of its values.
        image_mean, image_std: of each colour, of values in [0, 1].
        fit: "stretch" resizes a picture to `image_size`; "pad" leaves its scale (a larger one is shrunk to fit) and
            centres it on black.

    Raises:
        DataError: a field that makes no sense, by name.
    """

    def __init__(
        self,
        image_size: Sequence[int],
        tasks: Sequence[Task | Mapping[str, Any]],
        classes: Mapping[str, Sequence[str]] | None = None,
        units: Mapping[str, str] | None = None,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        fit: str = "stretch",
    ):
        if not isinstance(image_size, (list, tuple)) or len(image_size) != 2:
            raise DataError(f"image_size: expected [height, width], found {image_size!r:.80}")
        for side in image_size:
            check_int(side, 1, MAX_SIDE, "image_size")
        for name, values, low in (("image_mean", image_mean, -1e6), ("image_std", image_std, 1e-6)):
            if not isinstance(values, (list, tuple)) or len(values) != 3 or not all(map(_is_number, values)):
                raise DataError(f"{name}: expected three numbers, found {values!r:.80}")
            if not all(low <= value <= 1e6 for value in values):
                raise DataError(f"{name}: expected numbers of at least {low}, found {list(values)}")
        check_choice(fit, ("stretch", "pad"), "fit")
        try:
            self.parsed_tasks = parse_tasks([dict(task) if isinstance(task, Mapping) else task for task in tasks])
        except ValueError as error:
            raise DataError(str(error)) from None
        if not self.parsed_tasks:
            raise DataError("tasks: expected at least one task, found none")
        self.image_size, self.fit = (int(image_size[0]), int(image_size[1])), fit
        self.image_mean, self.image_std = tuple(map(float, image_mean)), tuple(map(float, image_std))
        self.classes = {name: tuple(names) for name, names in (classes or {}).items()}
        self.units = dict(units or {})
        self._check_names()

    def _check_names(self) -> None:
        by_name = {task.name: task for task in self.parsed_tasks}
        for field, named in (("classes", self.classes), ("units", self.units)):
            if unknown := [name for name in named if name not in by_name]:
                raise DataError(f"{field}: {UnknownTaskError(unknown, list(by_name))}")
        for name, names in self.classes.items():
            if len(names) != by_name[name].num_outputs or len(set(names)) < len(names):
                raise DataError(
                    f"classes of task {name!r}: expected {by_name[name].num_outputs} different names, found "
                    f"{list(names)!r:.80}"
                )

    # --- what the model's config needs ---

    @property
    def tasks(self) -> list[dict[str, Any]]:
        """The tasks as a config holds them."""
        return [task.to_dict() for task in self.parsed_tasks]

    def task(self, name: str) -> Task:
        """A task by name. Raises UnknownTaskError if there is none."""
        for task in self.parsed_tasks:
            if task.name == name:
                return task
        raise UnknownTaskError([name], [task.name for task in self.parsed_tasks])

    def for_tasks(self, tasks: Sequence[str]) -> "VisionProcessor":
        """The processor of the model that answers only `tasks`. Raises UnknownTaskError for one it does not know."""
        names = check_task_names(tasks, [task.name for task in self.parsed_tasks])
        return type(self)(
            self.image_size,
            [self.task(name) for name in names],
            {name: of for name, of in self.classes.items() if name in names},
            {name: of for name, of in self.units.items() if name in names},
            self.image_mean,
            self.image_std,
            self.fit,
        )

    # --- pictures -> tensors ---

    def __call__(self, images: Picture | Sequence[Picture], resize: bool = True) -> dict[str, Tensor]:
        """Encodes pictures, all at once.

        Args:
            images: one or several: of PIL, uint8 arrays `[H, W, 3]` or `[H, W]`, or paths of image files.
            resize: False leaves pictures at their own size, which must then be one for all.

        Returns:
            `pixel_values`: float32 `[B, 3, H, W]`, normalised.

        Raises:
            DataError: no picture, a file that is no image or is cut off, a type, mode or size that cannot be; names
                the file.
        """
        several: list[Any] = list(images) if isinstance(images, (list, tuple)) else [images]
        if not several:
            raise DataError("expected at least one picture, found none")
        pixels = [pixels_of(image) for image in several]
        if resize:
            pixels = [self.place(one) for one in pixels]
        if len({one.shape for one in pixels}) > 1:
            raise DataError(f"expected pictures of one size, found {sorted({one.shape[:2] for one in pixels})}")
        return {"pixel_values": self.normalise(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2))}

    def normalise(self, pixels_BCHW: Tensor) -> Tensor:
        """Pixels, uint8 or float32 in [0, 1], `[B, 3, H, W]` -> `pixel_values`, contiguous."""
        if pixels_BCHW.dtype == torch.uint8:
            pixels_BCHW = pixels_BCHW.float() / 255
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.image_mean, self.image_std))
        return ((pixels_BCHW - mean) / std).contiguous()

    def placement(self, height: int, width: int) -> Placement:
        """Where a picture of `height` x `width` pixels lies in the model's input."""
        if self.fit == "stretch":
            return Placement(0, 0, *self.image_size)
        shrink = min(1.0, self.image_size[0] / height, self.image_size[1] / width)
        h, w = max(1, round(height * shrink)), max(1, round(width * shrink))
        return Placement((self.image_size[0] - h) // 2, (self.image_size[1] - w) // 2, h, w)

    def place(self, pixels_HWC: np.ndarray) -> np.ndarray:
        """A picture, uint8, resized and padded as `fit` says to `[H, W, 3]`."""
        at = self.placement(*pixels_HWC.shape[:2])
        if pixels_HWC.shape[:2] != (at.height, at.width):
            pixels_HWC = self._resizer.resize(pixels_HWC.transpose(2, 0, 1), _size(at)).transpose(1, 2, 0)
        return _padded(pixels_HWC, at, self.image_size, 0)

    def place_map(self, label: np.ndarray, missing: float | int) -> np.ndarray:
        """A label map `[H, W]` or `[3, H, W]`, resized to the nearest pixel and padded with what is missing."""
        at = self.placement(*label.shape[-2:])
        rows = (np.arange(at.height) + 0.5) * label.shape[-2] / at.height
        columns = (np.arange(at.width) + 0.5) * label.shape[-1] / at.width
        resized = label[..., rows.astype(np.int64)[:, None], columns.astype(np.int64)]
        if resized.ndim == 2:
            return _padded(resized, at, self.image_size, missing)
        return np.stack([_padded(channel, at, self.image_size, missing) for channel in resized])

    @cached_property
    def _resizer(self) -> "ViTImageProcessorPil":
        from transformers import ViTImageProcessorPil

        return ViTImageProcessorPil()

    # --- logits -> predictions ---

    def decode(self, logits: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """Predictions in the user's units, by task.

        Args:
            logits: `[B, C]` or `[B, C, H, W]` by task; any subset of the tasks.

        Returns:
            segmentation: class numbers, int64 `[B, H, W]`; saliency, edges: probabilities `[B, H, W]`; normals: unit
            vectors `[B, 3, H, W]`; depth: values `[B, H, W]`; binary: probabilities `[B]`; regression: values `[B]` or
            `[B, C]`; multiclass: names of the most likely classes `[B]`, and `<task>/<class>`, probabilities;
            multilabel: `<task>/<class>`.

        Raises:
            UnknownTaskError: logits of a task the processor does not know.
        """
        decoded: dict[str, np.ndarray] = {}
        for name, values in logits.items():
            task = self.task(name)
            predicted = task.predict(values.detach().float().cpu())
            if task.kind == "segmentation":
                decoded[name] = predicted.argmax(1).numpy()
            elif task.kind in ("multiclass", "multilabel"):
                names = self.class_names(name)
                if task.kind == "multiclass":
                    decoded[name] = np.array(names, dtype=object)[predicted.argmax(1).numpy()]
                decoded |= {f"{name}/{of}": predicted[:, i].numpy() for i, of in enumerate(names)}
            else:
                decoded[name] = predicted.numpy()
        return decoded

    def class_names(self, task: str) -> tuple[str, ...]:
        """Names of a task's classes, by default their numbers."""
        return self.classes.get(task) or tuple(map(str, range(self.task(task).num_outputs)))

    def unscale(self, task: str, values: Tensor) -> Tensor:
        """Values of a task in its units, in which a model of pictures is trained: as they are.

        Raises:
            UnknownTaskError: the processor does not know the task.
        """
        self.task(task)
        return values

    def draw(self, image: Picture, task: str, prediction: Any) -> Image.Image:
        """A prediction over the picture it was made from, see `moe_mtl.data.drawing`.

        Args:
            image: as for `__call__`.
            task: its name.
            prediction: what `decode` gives for one picture: a map of the picture's own size or of the model's input,
                which is then fitted to the picture; or a class, a value or several, or the probabilities of several
                labels, which are written below it.

        Returns:
            RGB, with a legend where there is something to tell.

        Raises:
            UnknownTaskError: the processor does not know the task.
            DataError: no image, or a prediction that is not of this task.
        """
        from .drawing import draw

        return draw(self, pixels_of(image), self.task(task), prediction)

    # --- files ---

    def to_dict(self) -> dict[str, Any]:
        """All that the processor is, as JSON types."""
        return {
            "processor_class": type(self).__name__,
            "processor_type": TYPE,
            "version": VERSION,
            "image_size": list(self.image_size),
            "fit": self.fit,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
            "tasks": self.tasks,
            "classes": {name: list(names) for name, names in self.classes.items()},
            "units": self.units,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "VisionProcessor":
        """The inverse of `to_dict`.

        Raises:
            DataError: an unknown or missing field, a version of another library release, a value of the wrong type.
        """
        own = ("image_size", "tasks", "classes", "units", "image_mean", "image_std", "fit")
        keys = ("processor_class", "processor_type", "version", *own)
        fields = check_keys(fields, keys, FILE, keys)
        check_choice(fields["processor_class"], (cls.__name__,), f"{FILE}: processor_class")
        check_choice(fields["processor_type"], (TYPE,), f"{FILE}: processor_type")
        check_choice(fields["version"], (VERSION,), f"{FILE}: version")
        if not isinstance(fields["tasks"], list) or not all(isinstance(task, dict) for task in fields["tasks"]):
            raise DataError(f"{FILE}: tasks: expected a list of mappings, found {fields['tasks']!r:.80}")
        for key in ("classes", "units"):
            if not isinstance(fields[key], dict):
                raise DataError(f"{FILE}: {key}: expected a mapping, found {fields[key]!r:.80}")
        for name, names in fields["classes"].items():
            if not isinstance(names, list) or not all(isinstance(of, str) for of in names):
                raise DataError(f"{FILE}: classes of {name!r}: expected a list of texts, found {names!r:.80}")
        for name, unit in fields["units"].items():
            if not isinstance(unit, str):
                raise DataError(f"{FILE}: unit of {name!r}: expected a text, found {unit!r:.80}")
        return cls(**{key: fields[key] for key in own})

    def __repr__(self) -> str:
        height, width = self.image_size
        names = ", ".join(task.name for task in self.parsed_tasks)
        return f"{type(self).__name__}({height} x {width}, {self.fit}; tasks: {names})"


def pixels_of(image: Picture) -> np.ndarray:
    """A picture as uint8 `[H, W, 3]`, turned upright where its file says how it was held.

    Raises:
        DataError: a file that is no image or is cut off, a type, mode or size that cannot be; names the file.
    """
    where = "picture"
    if isinstance(image, (str, Path)):
        where = str(image)
        image = _opened(Path(image))
    if isinstance(image, Image.Image):
        return _rgb(image, where)
    if not isinstance(image, np.ndarray):
        raise DataError(f"{where}: expected a PIL image, an array or a path, found {type(image).__name__}")
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        raise DataError(
            f"{where}: expected uint8 [height, width, 3] or [height, width], found {image.dtype} {list(image.shape)}"
        )
    _check_size(image.shape[0], image.shape[1], where)
    return image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2)


def _opened(path: Path) -> Image.Image:
    from PIL import ImageOps

    try:
        with Image.open(path) as image:
            _check_size(image.height, image.width, str(path))
            image.load()
            return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise DataError(f"{path}: expected an image file, found none") from None
    except UnidentifiedImageError:
        raise DataError(f"{path}: expected an image, found a file of another kind") from None
    except DataError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what PIL's decoders raise
        raise DataError(f"{path}: expected a whole image, found one that cannot be read: {error}") from None


def _rgb(image: Image.Image, where: str) -> np.ndarray:
    _check_size(image.height, image.width, where)
    if image.mode.startswith(("I", "F")):
        raise DataError(f"{where}: expected an image of 8 bits per colour, found mode {image.mode!r}")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:  # seen through: white
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _check_size(height: int, width: int, where: str) -> None:
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise DataError(f"{where}: expected 1 to {MAX_SIDE} pixels a side, found {height} x {width}")


def _padded(map_HW: np.ndarray, at: Placement, size: tuple[int, int], value: float | int) -> np.ndarray:
    if (at.height, at.width) == size:
        return map_HW
    canvas = np.full((*size, *map_HW.shape[2:]), value, map_HW.dtype)
    canvas[at.top : at.top + at.height, at.left : at.left + at.width] = map_HW
    return canvas


def _size(at: Placement) -> Any:
    from transformers.image_utils import SizeDict

    return SizeDict(height=at.height, width=at.width)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
