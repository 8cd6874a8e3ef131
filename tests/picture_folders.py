"""Folders of pictures and label maps as PASCAL-Context and NYU Depth v2 have them, small and random."""

import numpy as np
from PIL import Image
from scipy.io import savemat

SIZE = (16, 24)  # of PASCAL's pictures
NYUD_SIZE = (17, 23)
CAT, PERSON = 8, 15


def part(name: str, rows: slice, columns: slice) -> dict:
    mask = np.zeros(SIZE, np.uint8)
    mask[rows, columns] = 1
    return {"part_name": name, "mask": mask}


def structs(items: list[dict]) -> np.ndarray:
    """A MATLAB struct array."""
    out = np.empty(len(items), dtype=[(key, object) for key in (items[0] if items else {"x": 0})])
    for i, item in enumerate(items):
        out[i] = tuple(item.values())
    return out


def thing(kind: int, parts: list[dict]) -> dict:
    mask = np.ones(SIZE, np.uint8)
    return {"class": "x", "class_ind": kind, "mask": mask, "parts": structs(parts) if parts else np.zeros((0, 0))}


PEOPLE = [
    thing(PERSON, [part("hair", slice(0, 4), slice(0, 4)), part("neck", slice(4, 8), slice(0, 4))]),
    thing(CAT, [part("head", slice(8, 16), slice(12, 24))]),
    thing(PERSON, [part("lhand", slice(0, 2), slice(10, 12)), part("rfoot", slice(2, 4), slice(10, 12))]),
]


def pascal_mt(root, train: int = 30, val: int = 3):
    """A folder PASCAL_MT; the first tested picture has people, the second a cat, the third a person without parts."""
    rng = np.random.default_rng(0)
    names = [f"2008_{i:06d}" for i in range(train + val)]
    folders = ("JPEGImages", "semseg/VOC12", "semseg/pascal-context", "human_parts", "normals_distill", "sal_distill")
    for folder in (*folders, "pascal-context/trainval", "ImageSets/Context"):
        (root / folder).mkdir(parents=True)
    (root / "ImageSets/Context/train.txt").write_text("\n".join(names[:train]))
    (root / "ImageSets/Context/val.txt").write_text("\n".join(names[train:]))
    for number, name in enumerate(names):
        Image.fromarray(rng.integers(0, 256, (*SIZE, 3), np.uint8)).save(root / f"JPEGImages/{name}.jpg")
        classes = rng.integers(0, 21, SIZE).astype(np.uint8)
        classes[0] = 255
        coloured = Image.fromarray(classes).convert("L")
        coloured = Image.frombytes("P", coloured.size, coloured.tobytes())
        coloured.putpalette(rng.integers(0, 256, 768).astype(np.uint8).tobytes())
        coloured.save(root / f"semseg/{'VOC12' if number % 2 else 'pascal-context'}/{name}.png")
        objects = [PEOPLE, [thing(CAT, [])], [thing(PERSON, []), thing(CAT, [])]][max(number - train, 0)]
        savemat(root / f"human_parts/{name}.mat", {"anno": {"imname": name, "objects": structs(objects)}})
        Image.fromarray(rng.integers(0, 256, (*SIZE, 3), np.uint8)).save(root / f"normals_distill/{name}.png")
        Image.fromarray(rng.integers(0, 256, SIZE, np.uint8)).save(root / f"sal_distill/{name}.png")
        context = np.full(SIZE, 284, np.int32)  # person
        context[:, 10:] = 360  # sky, which has no normals
        savemat(root / f"pascal-context/trainval/{name}.mat", {"LabelMap": context})
    return root


def nyud_mt(root, train: int = 30, val: int = 2):
    """A folder NYUD_MT with random maps."""
    rng = np.random.default_rng(0)
    for folder in ("images", "segmentation", "depth", "normals", "edge", "gt_sets"):
        (root / folder).mkdir(parents=True)
    names = [f"nyu_{i:04d}" for i in range(train + val)]
    (root / "gt_sets" / "train.txt").write_text("\n".join(names[:train]) + "\n")
    (root / "gt_sets" / "val.txt").write_text("\n".join(names[train:]))
    for name in names:
        Image.fromarray(rng.integers(0, 256, (*NYUD_SIZE, 3), np.uint8)).save(root / "images" / f"{name}.jpg")
        Image.fromarray(rng.integers(0, 41, NYUD_SIZE, np.uint8)).save(root / "segmentation" / f"{name}.png")
        depth = rng.random(NYUD_SIZE, np.float32) * 9 + 1
        depth[0, :5] = 0
        np.save(root / "depth" / f"{name}.npy", depth)
        normals = rng.normal(size=(*NYUD_SIZE, 3)).astype(np.float32)
        normals[3, 4] = 0
        np.save(root / "normals" / f"{name}.npy", normals)
        np.save(root / "edge" / f"{name}.npy", (rng.random(NYUD_SIZE) < 0.1).astype(np.float32))
    return root
