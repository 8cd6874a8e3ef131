"""NYU Depth v2 with four label maps per picture: the folder NYUD_MT, as the field has used it since ASTMT.

Silberman, Hoiem, Kohli and Fergus, "Indoor Segmentation and Support Inference from RGBD Images" (ECCV 2012); protocol
of Ye and Xu, "InvPT" (ECCV 2022). The folder holds:

    gt_sets/{train,val}.txt    names; on val the field reports
    images/NAME.jpg
    segmentation/NAME.png      1 to 40, 0 ignored
    depth/NAME.npy             metres, 0 where nothing was measured
    normals/NAME.npy           [H, W, 3], 0 where there is none
    edge/NAME.npy              [H, W], 0 or 1

Differs from the official code in: validation pictures are set aside from train, where the field chooses on what it
reports; a picture that is larger than the model's input is shrunk to fit, not cut.

Shapes: `H`, `W` height and width of a picture in pixels.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ..tasks import Task
from .errors import DataError
from .images import ImageSplits, LabelFiles, check_tasks
from .label_files import (
    file_splits,
    folder_of,
    names_in,
    read_numbers,
    read_png,
    require_files,
    unit_normals,
    with_edge_options,
)
from .vision_processor import IMAGENET_MEAN, IMAGENET_STD, VisionProcessor

NUM_CLASSES = 40
# Weights of ASTMT and InvPT.
TASKS = {
    "segmentation": Task("segmentation", "segmentation", NUM_CLASSES),
    "depth": Task("depth", "depth"),
    "normals": Task("normals", "normals", 3, weight=10.0),
    "edges": Task("edges", "edges", weight=50.0),
}
FILES = {
    "segmentation": "segmentation/{}.png",
    "depth": "depth/{}.npy",
    "normals": "normals/{}.npy",
    "edges": "edge/{}.npy",
}
CLASSES = """
wall floor cabinet bed chair sofa table door window bookshelf picture counter blinds desk shelves curtain dresser pillow
mirror floor_mat clothes ceiling books refrigerator television paper towel shower_curtain box whiteboard person
night_stand toilet sink lamp bathtub bag other_structure other_furniture other_prop
"""


@dataclass(frozen=True)
class Options:
    """Options of NYU Depth v2.

    Attributes:
        path: the folder NYUD_MT.
        tasks: which of segmentation, depth, normals, edges.
        image_size: height and width of the model's input: pictures keep their scale and are centred on black.
        validation: share of the training pictures that is set aside.
        augment: mirror, enlarge and shrink training pictures, and change their brightness and contrast, as InvPT does.
        edge_weight: of an edge pixel in the loss, see `Task`; 0.925 in MLoRE.
        edge_tolerance: of `ods_f`, a fraction of the picture's diagonal, see `Task`.
    """

    path: str | Path
    tasks: tuple[str, ...] = tuple(TASKS)
    image_size: tuple[int, ...] = (448, 576)
    validation: float = 0.05
    augment: bool = True
    edge_weight: float = 0.95
    edge_tolerance: float = 0.011


def load(options: Options) -> ImageSplits:
    """795 pictures for training and validation, 654 for testing, read when they are needed.

    Raises:
        DataError: a folder, list or file that is not there, by its path; an unknown task, an option out of its range.
    """
    tasks = check_tasks("nyud-v2", options.tasks, list(TASKS))
    folders = [FILES[task].partition("/")[0] for task in tasks]
    root = folder_of("nyud-v2", options.path, ["gt_sets", "images", *folders])
    processor = VisionProcessor(
        options.image_size,
        with_edge_options((TASKS[task] for task in tasks), options.edge_weight, options.edge_tolerance),
        {"segmentation": CLASSES.split()} if "segmentation" in tasks else {},
        {"depth": "m"} if "depth" in tasks else {},
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
        fit="pad",
    )
    lists = {part: names_in(root / "gt_sets" / f"{part}.txt") for part in ("train", "val")}
    files = ["images/{}.jpg", *(FILES[task] for task in tasks)]
    content = require_files(root / file.format(name) for names in lists.values() for name in names for file in files)
    readers = {task: LabelFiles(partial(_label, root, task)) for task in tasks}
    info = {
        "name": "nyud-v2",
        "licence": "NYU Depth v2 terms, for research",
        "sha256": content,  # of the names and sizes of the files
    }
    return file_splits(lists, options.validation, partial(_picture, root), readers, processor, options.augment, info)


def _picture(root: Path, name: str) -> Path:
    return root / "images" / f"{name}.jpg"


def _label(root: Path, task: str, name: str) -> np.ndarray:
    path = root / FILES[task].format(name)
    if task == "normals":
        return unit_normals(path, read_numbers(path))
    values = read_png(path) if task == "segmentation" else read_numbers(path)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.ndim != 2:
        raise DataError(f"{path}: expected a map [height, width], found {list(values.shape)}")
    if task == "segmentation":
        if values.max() > NUM_CLASSES:
            raise DataError(f"{path}: expected classes from 0 to {NUM_CLASSES}, found {values.max()}")
        return np.where(values == 0, -100, values.astype(np.int64) - 1)
    values = values.astype(np.float32)
    if task == "depth":
        return np.where(np.isfinite(values) & (values > 0), values, np.nan)
    if not ((values >= 0) & (values <= 1)).all():
        raise DataError(f"{path}: expected edges from 0 to 1, found {values.min()} to {values.max()}")
    return values
