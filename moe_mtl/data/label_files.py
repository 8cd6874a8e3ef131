"""Label maps in files, as data sets of dense prediction come: lists of names, .png, .npy, .mat. Nothing is unpickled.

Shapes: `H`, `W` height and width of a picture in pixels.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..tasks import Task
from .augmentation import Augmentation
from .errors import DataError
from .images import FileImages, ImageSplits, LabelFiles, rows_of
from .vision_processor import VisionProcessor

IGNORED = 255  # the pixel that has no label


def folder_of(name: str, path: str | Path, needed: Iterable[str]) -> Path:
    """The folder of a data set. Raises DataError, with what was looked for, unless all folders needed are in it."""
    root = Path(path)
    for entry in ("", *needed):
        if not (root / entry).is_dir():
            raise DataError(f"{name}: path: expected a folder {root / entry}, found none")
    return root


def names_in(path: Path) -> list[str]:
    """The names of pictures in a list, one a line.

    Raises:
        DataError: no such file, an empty list, a name twice, a name that is none; with the file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise DataError(f"{path}: expected a list of pictures, found none") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected a list of pictures, found a file that cannot be read: {error}") from None
    names: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not (text := line.strip()):
            continue
        if not re.fullmatch(r"\w[\w.-]*", text, re.ASCII):
            raise DataError(f"{path}, line {number}: expected the name of a picture, found {text!r:.80}")
        if text in names:
            raise DataError(f"{path}, line {number}: expected each picture once, found {text!r} of line {names[text]}")
        names[text] = number
    if not names:
        raise DataError(f"{path}: expected names of pictures, found none")
    return list(names)


def require_files(paths: Iterable[Path]) -> str:
    """sha256 of the files' names and sizes. Raises DataError for the first one that is not there."""
    digest = hashlib.sha256()
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path}: expected a file, found none")
        digest.update(f"{path.parent.name}/{path.name} {path.stat().st_size}\n".encode())
    return digest.hexdigest()


def held_out(names: Iterable[str], share: float) -> tuple[list[str], list[str]]:
    """What remains for training, and the share that is set aside for validation, chosen by sha256 of the name."""
    rest: list[str] = []
    aside: list[str] = []
    for name in names:
        drawn = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 16**8
        (aside if drawn < share else rest).append(name)
    return rest, aside


def with_edge_options(tasks: Iterable[Task], edge_weight: float, edge_tolerance: float) -> list[dict[str, Any]]:
    """The tasks as a processor takes and checks them, those of edges with what a data set's options say of them."""
    options = {"edge_weight": edge_weight, "edge_tolerance": edge_tolerance}
    return [task.to_dict() | (options if task.kind == "edges" else {}) for task in tasks]


def file_splits(
    lists: Mapping[str, list[str]],
    validation: float,
    picture: Callable[[str], Path],
    labels: Mapping[str, LabelFiles],
    processor: VisionProcessor,
    augment: bool,
    info: dict[str, Any],
) -> ImageSplits:
    """The parts of a data set whose lists are `train`, of which a share is set aside, and `val`, which is tested on.

    Training pictures are mirrored, enlarged or shrunk, and changed in brightness and contrast, about as InvPT does.

    Raises:
        DataError: a share that leaves nothing for training or validation.
    """
    train, aside = held_out(lists["train"], validation)
    if not train or not aside:
        raise DataError(
            f"validation: expected a share that leaves pictures for training and validation, found {validation}, which "
            f"leaves {len(train)} and {len(aside)}"
        )
    changes = Augmentation(mirror=True, scale=(0.5, 2.0), brightness=0.125, contrast=0.5) if augment else None
    parts = {
        "train": FileImages(train, picture, labels, processor, changes),
        "validation": FileImages(aside, picture, labels, processor),
        "test": FileImages(lists["val"], picture, labels, processor),
    }
    return ImageSplits(**parts, tasks=processor.parsed_tasks, processor=processor, info=info | {"rows": rows_of(parts)})


def read_png(path: Path) -> np.ndarray:
    """uint8 `[H, W]`, numbers of a palette as they are, or `[H, W, 3]`. Raises DataError, with the file."""
    try:
        with Image.open(path) as image:
            if image.mode not in ("L", "P", "RGB", "1"):
                raise DataError(f"{path}: expected a map of 8 bits, found mode {image.mode!r}")
            return np.array(image.convert("L") if image.mode == "1" else image)
    except FileNotFoundError:
        raise DataError(f"{path}: expected a label map, found none") from None
    except DataError:
        raise
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path}: expected an image, found a file that cannot be read: {error}") from None


def read_numbers(path: Path) -> np.ndarray:
    """An array of numbers in a .npy file. Raises DataError, with the file."""
    try:
        values = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path}: expected a label map, found none") from None
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: expected an array of numbers, found a file that cannot be read: {error}") from None
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "biuf":
        raise DataError(f"{path}: expected an array of numbers, found {type(values).__name__}")
    return values


def read_mat(path: Path, variable: str) -> Any:
    """A variable of a MATLAB file up to version 7, its structs as dicts. Raises DataError, with the file."""
    from scipy.io import loadmat

    try:
        content = loadmat(path, variable_names=[variable], simplify_cells=True, appendmat=False)
    except FileNotFoundError:
        raise DataError(f"{path}: expected a label map, found none") from None
    except Exception as error:  # what a damaged file makes scipy raise is not told
        raise DataError(f"{path}: expected a MATLAB file, found one that cannot be read: {error}") from None
    if variable not in content:
        raise DataError(f"{path}: expected the variable {variable!r}, found none")
    return content[variable]


def class_map(path: Path, values_HW: np.ndarray, num_classes: int) -> np.ndarray:
    """int64 `[H, W]`, 255 as -100. Raises DataError for a class that is none."""
    if values_HW.ndim != 2:
        raise DataError(f"{path}: expected a map [height, width], found {list(values_HW.shape)}")
    classes = np.where(values_HW == IGNORED, -100, values_HW.astype(np.int64))
    if classes.max(initial=0) >= num_classes:
        raise DataError(f"{path}: expected classes below {num_classes} or 255, found {classes.max()}")
    return classes


def unit_normals(path: Path, vectors_HWC: np.ndarray) -> np.ndarray:
    """float32 `[3, H, W]`, of length 1; NaN where a vector is nothing. Raises DataError for what is no vector."""
    if vectors_HWC.ndim != 3 or vectors_HWC.shape[2] != 3:
        raise DataError(f"{path}: expected vectors [height, width, 3], found {list(vectors_HWC.shape)}")
    vectors = vectors_HWC.astype(np.float64)
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    known = np.isfinite(length) & (length > 1e-6)
    return np.where(known, vectors / np.where(known, length, 1), np.nan).transpose(2, 0, 1).astype(np.float32)
