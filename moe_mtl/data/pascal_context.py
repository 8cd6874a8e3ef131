"""PASCAL-Context with five label maps per picture: the folder PASCAL_MT, as the field has used it since ASTMT.

Maninis, Radosavovic and Kokkinos, "Attentive Single-Tasking of Multiple Tasks" (CVPR 2019), who distilled saliency and
normals from other networks; protocol of Ye and Xu, "InvPT" (ECCV 2022). The folder holds:

    ImageSets/Context/{train,val}.txt   names; on val the field reports
    ImageSets/Parts/{train,val}.txt     optional: JSON, name -> numbers of the objects in it (15: person)
    JPEGImages/NAME.jpg
    semseg/{VOC12,pascal-context}/NAME.png       21 classes, 255 ignored; VOC12 is taken where both exist
    human_parts/NAME.mat                anno, as in PASCAL-Part
    normals_distill/NAME.png            red, green, blue: x, y, z from -1 to 1
    sal_distill/NAME.png                salient above 127
    pascal-context/trainval/NAME.mat    LabelMap, 459 classes; edges are where it changes

Differs from the official code in: validation pictures are set aside from train, where the field chooses on what it
reports; nothing is written into the folder.

Shapes: `H`, `W` height and width of a picture in pixels.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..tasks import Task
from .errors import DataError
from .images import ImageSplits, LabelFiles, check_tasks
from .label_files import (
    class_map,
    file_splits,
    folder_of,
    names_in,
    read_mat,
    read_png,
    require_files,
    unit_normals,
    with_edge_options,
)
from .vision_processor import IMAGENET_MEAN, IMAGENET_STD, VisionProcessor

# Weights of ASTMT and InvPT.
TASKS = {
    "segmentation": Task("segmentation", "segmentation", 21),
    "human_parts": Task("human_parts", "segmentation", 7, weight=2.0),
    "saliency": Task("saliency", "saliency", weight=5.0),
    "normals": Task("normals", "normals", 3, weight=10.0),
    "edges": Task("edges", "edges", weight=50.0),
}
CLASSES = {
    "segmentation": """
        background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person
        pottedplant sheep sofa train tvmonitor
    """,
    "human_parts": "background head torso upper_arm lower_arm upper_leg lower_leg",
}
PERSON = 15
# Names of PASCAL-Part by the group they are counted to.
PARTS = {
    "head": "hair head lear lebrow leye mouth nose rear rebrow reye",
    "torso": "neck torso",
    "upper_arm": "luarm ruarm",
    "lower_arm": "llarm rlarm lhand rhand",
    "upper_leg": "luleg ruleg",
    "lower_leg": "llleg rlleg lfoot rfoot",
}
PART_NUMBERS = {name: number for number, names in enumerate(PARTS.values(), 1) for name in names.split()}
# Numbers of the Context classes that NYU Depth has too: on these the distilled normals are trusted (ASTMT).
WITH_NORMALS = """
3 4 6 9 10 11 13 15 17 18 22 23 29 30 33 34 36 37 38 39 41 43 46 49 50 51 53 55 56 59 61 62 65 66 68 69 72 73 78 83
84 85 87 88 95 96 101 104 105 107 111 113 115 122 124 135 141 142 143 146 150 154 157 158 159 165 172 174 181 183
184 191 193 195 197 199 202 213 215 216 219 220 223 225 228 230 232 233 238 239 242 243 246 250 251 252 255 260 261
263 269 272 273 275 281 283 284 285 286 287 288 290 291 292 293 295 304 307 309 310 314 315 319 323 329 330 331 336
342 345 349 350 351 352 355 357 368 370 371 374 379 380 383 384 397 401 403 405 407 408 411 412 413 414 417 419 421
423 427 429 430 432 440 441 442 443 444 446 454 457
"""


@dataclass(frozen=True)
class Options:
    """Options of PASCAL-Context.

    Attributes:
        path: the folder PASCAL_MT.
        tasks: which of segmentation, human_parts, saliency, normals, edges.
        image_size: height and width of the model's input: pictures keep their scale and are centred on black.
        validation: share of the training pictures that is set aside.
        augment: mirror, enlarge and shrink training pictures, and change their brightness and contrast, as InvPT does.
        edge_weight: of an edge pixel in the loss, see `Task`; 0.925 in MLoRE.
        edge_tolerance: of `ods_f`, a fraction of the picture's diagonal, see `Task`.
    """

    path: str | Path
    tasks: tuple[str, ...] = tuple(TASKS)
    image_size: tuple[int, ...] = (512, 512)
    validation: float = 0.05
    augment: bool = True
    edge_weight: float = 0.95
    edge_tolerance: float = 0.0075


def load(options: Options) -> ImageSplits:
    """4,998 pictures for training and validation, 5,105 for testing, read when they are needed.

    Raises:
        DataError: a folder, list or file that is not there, by its path; an unknown task, an option out of its range.
    """
    tasks = check_tasks("pascal-context", options.tasks, list(TASKS))
    root = folder_of("pascal-context", options.path, ["JPEGImages", "ImageSets/Context"])
    readers = {task: _labels(root, task) for task in tasks}
    processor = VisionProcessor(
        options.image_size,
        with_edge_options((TASKS[task] for task in tasks), options.edge_weight, options.edge_tolerance),
        {task: CLASSES[task].split() for task in tasks if task in CLASSES},
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
        fit="pad",
    )
    lists = {part: names_in(root / "ImageSets" / "Context" / f"{part}.txt") for part in ("train", "val")}
    content = require_files(path for names in lists.values() for name in names for path in _files(root, name, tasks))
    info = {
        "name": "pascal-context",
        "licence": "PASCAL VOC terms (Flickr photographs); labels for research",
        "sha256": content,  # of the names and sizes of the files
    }
    return file_splits(lists, options.validation, partial(_picture, root), readers, processor, options.augment, info)


def _picture(root: Path, name: str) -> Path:
    return root / "JPEGImages" / f"{name}.jpg"


def _segmentation_file(root: Path, name: str) -> Path:
    voc = root / "semseg" / "VOC12" / f"{name}.png"
    return voc if voc.is_file() else root / "semseg" / "pascal-context" / f"{name}.png"


def _files(root: Path, name: str, tasks: list[str]) -> list[Path]:
    """What the tasks need of a picture."""
    context = root / "pascal-context" / "trainval" / f"{name}.mat"
    files = {
        "segmentation": [_segmentation_file(root, name)],
        "human_parts": [root / "human_parts" / f"{name}.mat"],
        "saliency": [root / "sal_distill" / f"{name}.png"],
        "normals": [root / "normals_distill" / f"{name}.png", context],
        "edges": [context],
    }
    return [_picture(root, name), *(path for task in tasks for path in files[task])]


def _labels(root: Path, task: str) -> LabelFiles:
    readers = {
        "segmentation": _segmentation,
        "human_parts": _human_parts,
        "saliency": _saliency,
        "normals": _normals,
        "edges": _edges,
    }
    read = partial(readers[task], root)
    return LabelFiles(read, partial(_with_people, _without_people(root))) if task == "human_parts" else LabelFiles(read)


def _with_people(absent: frozenset[str], name: str) -> bool:
    return name not in absent


def _without_people(root: Path) -> frozenset[str]:
    """Pictures of which the lists of objects say that nobody is in them; they need not be read for human parts."""
    absent: set[str] = set()
    for part in ("train", "val"):
        path = root / "ImageSets" / "Parts" / f"{part}.txt"
        if not path.is_file():
            continue
        try:
            objects = json.loads(path.read_bytes())
        except ValueError as error:
            raise DataError(f"{path}: expected JSON, found a file that cannot be read: {error}") from None
        if not isinstance(objects, dict) or not all(isinstance(of, list) for of in objects.values()):
            raise DataError(f"{path}: expected names and lists of object numbers, found {objects!r:.80}")
        absent |= {name for name, of in objects.items() if PERSON not in of}
    return frozenset(absent)


def _segmentation(root: Path, name: str) -> np.ndarray:
    path = _segmentation_file(root, name)
    return class_map(path, read_png(path), 21)


def _saliency(root: Path, name: str) -> np.ndarray:
    path = root / "sal_distill" / f"{name}.png"
    values = read_png(path)
    if values.ndim != 2:
        raise DataError(f"{path}: expected a map [height, width], found {list(values.shape)}")
    return (values > 127).astype(np.float32)


def _context(root: Path, name: str) -> np.ndarray:
    path = root / "pascal-context" / "trainval" / f"{name}.mat"
    label = np.asarray(read_mat(path, "LabelMap"))
    if label.ndim != 2 or label.dtype.kind not in "iuf":
        raise DataError(f"{path}: expected LabelMap [height, width], found {label.dtype} {list(label.shape)}")
    return label


def _edges(root: Path, name: str) -> np.ndarray:
    """Lines of one pixel where the classes change: where the Laplacian of their numbers is not 0, thinned (ASTMT)."""
    from scipy import ndimage
    from skimage.morphology import thin

    changes = ndimage.laplace(_context(root, name).astype(np.float64), mode="mirror") != 0
    return thin(changes).astype(np.float32)


def _normals(root: Path, name: str) -> np.ndarray:
    path = root / "normals_distill" / f"{name}.png"
    colours, label = read_png(path), _context(root, name)
    normals = unit_normals(path, colours.astype(np.float64) * 2 / 255 - 1)
    if label.shape != normals.shape[1:]:
        raise DataError(f"{path}: expected {list(label.shape)} pixels as LabelMap has, found {list(normals.shape[1:])}")
    return np.where(np.isin(label, [int(i) for i in WITH_NORMALS.split()]), normals, np.nan).astype(np.float32)


def _human_parts(root: Path, name: str) -> np.ndarray:
    """Numbers of the parts of all people, 0 elsewhere; all missing where there are none (ASTMT)."""
    path = root / "human_parts" / f"{name}.mat"
    anno = read_mat(path, "anno")
    objects = _several(anno["objects"]) if isinstance(anno, dict) and "objects" in anno else []
    if not objects:
        raise DataError(f"{path}: expected anno with objects, found none")
    parts_HW = np.zeros(np.shape(objects[0]["mask"]), np.int64)
    for one in objects:
        if int(one["class_ind"]) != PERSON:
            continue
        for part in _several(one["parts"]):
            if part["part_name"] not in PART_NUMBERS:
                raise DataError(f"{path}: expected a part of PASCAL-Part, found {part['part_name']!r:.80}")
            parts_HW[np.asarray(part["mask"]).astype(bool)] = PART_NUMBERS[part["part_name"]]
    return parts_HW if parts_HW.any() else np.full_like(parts_HW, -100)


def _several(structs: Any) -> list[dict[str, Any]]:
    """scipy gives one struct as itself, several as an array or list, none as an empty array."""
    return [structs] if isinstance(structs, dict) else [one for one in structs if isinstance(one, dict)]
