"""Photographs of any size in, maps of their own size out: large ones by overlapping windows of the model's input.

Shapes: `B` windows of a batch, `C` outputs of a task, `H`, `W` height and width of a photograph, `h`, `w` of the
model's input.
"""

import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..data import DataError
from ..data.vision_processor import Picture, VisionProcessor, pixels_of
from ..files import write_atomically
from ..hub import read_config, resolve
from ..models import AutoModelForMultiTask, MultiTaskConfig, MultiTaskModel, model_class
from ..tasks import check_task_names

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
ANSWERS = "answers.jsonl"  # in a folder of pictures
WINDOWS = 64  # at a time
OVERLAP = 0.5  # of a window's side, at least


def pictures_in(paths: Sequence[str | Path]) -> list[Path]:
    """The picture files that paths name; of a folder those in it, by name.

    Raises:
        DataError: a path that does not exist, a folder without a picture.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
            if not inside:
                raise DataError(f"{path}: expected pictures ({', '.join(SUFFIXES)}), found none")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"{path}: expected a picture or a folder of pictures, found none")
    return found


def predict_picture(
    model: MultiTaskModel,
    processor: VisionProcessor,
    image: Picture,
    tasks: str | Sequence[str] | None = None,
    batch_size: int = WINDOWS,
    advance: Callable[[int], Any] = lambda windows: None,
) -> dict[str, np.ndarray]:
    """Answers about one photograph; maps are as large as it is.

    Dense tasks: where the photograph is larger than the model's input, windows of that size cover it, each overlapping
    the next by half or more, so that the model sees the scale that it was trained on. What is blended is the tasks'
    own quantity (probabilities, unit vectors, depth), weighed by a window that falls to its border as a cosine does. A
    smaller photograph is enlarged first, with its proportions, until it holds one window. A model whose processor pads
    sees the photograph once and whole, as in training. Other tasks: the photograph as a whole, fitted to the model's
    input as in training.

    Args:
        model: of pictures; computes in evaluation mode.
        processor: the model's.
        image: as `VisionProcessor` takes it.
        tasks: which; all by default. No other is computed.
        batch_size: windows per forward pass.
        advance: is told how many windows were done.

    Returns:
        what `VisionProcessor.decode` gives, without the dimension of the batch.

    Raises:
        UnknownTaskError: a task that the model does not have.
        DataError: no image.
    """
    names = check_task_names(tasks, model.tasks)
    pixels_HWC = pixels_of(image)
    dense = [name for name in names if processor.task(name).dense]
    whole = [name for name in names if name not in dense]
    out: dict[str, np.ndarray] = {}
    was_training = model.training
    model.eval()
    try:
        if whole:
            logits = _logits(model, processor(pixels_HWC)["pixel_values"], whole)
            out |= {name: values[0] for name, values in processor.decode(logits).items()}
        if dense:
            out |= _maps(model, processor, pixels_HWC, dense, batch_size, advance)
    finally:
        model.train(was_training)
    return {key: out[key] for name in names for key in out if key == name or key.startswith(f"{name}/")}


def count_windows(processor: VisionProcessor, height: int, width: int) -> int:
    """How many windows a photograph takes."""
    return 1 if processor.fit == "pad" else len(_corners(processor, *_scaled(processor, height, width)))


def _maps(
    model: MultiTaskModel,
    processor: VisionProcessor,
    pixels_HWC: np.ndarray,
    tasks: list[str],
    batch_size: int,
    advance: Callable[[int], Any],
) -> dict[str, np.ndarray]:
    """Predictions of dense tasks at the photograph's own size."""
    size = pixels_HWC.shape[:2]
    if processor.fit == "pad":
        logits = _logits(model, processor(pixels_HWC)["pixel_values"], tasks)
        at = processor.placement(*size)
        inside = (..., slice(at.top, at.top + at.height), slice(at.left, at.left + at.width))
        advance(1)
        out = {}
        for name in tasks:
            predicted = processor.task(name).predict(logits[name])
            map_CHW = predicted[0] if predicted.dim() == 4 else predicted
            out[name] = _finished(processor, name, map_CHW[inside], size)
        return out
    scaled = _scaled(processor, *size)
    values_1CHW = processor(pixels_HWC, resize=False)["pixel_values"]
    if scaled != size:
        values_1CHW = F.interpolate(values_1CHW, scaled, mode="bilinear", align_corners=False)
    h, w = processor.image_size
    weight_hw = (_rise(h)[:, None] * _rise(w)).float()
    corners = _corners(processor, *scaled)
    total_HW = torch.zeros(scaled)
    sums: dict[str, Tensor] = {}
    for start in range(0, len(corners), batch_size):
        chosen = corners[start : start + batch_size]
        windows = torch.cat([values_1CHW[:, :, y : y + h, x : x + w] for y, x in chosen])
        logits = _logits(model, windows, tasks)
        for name in tasks:
            predicted = processor.task(name).predict(logits[name])
            channels = predicted if predicted.dim() == 4 else predicted.unsqueeze(1)
            sums.setdefault(name, torch.zeros(channels.shape[1], *scaled))
            for (y, x), one_Chw in zip(chosen, channels, strict=True):
                sums[name][:, y : y + h, x : x + w] += weight_hw * one_Chw
        for y, x in chosen:
            total_HW[y : y + h, x : x + w] += weight_hw
        advance(len(chosen))
    return {name: _finished(processor, name, sums[name] / total_HW, size) for name in tasks}


def _finished(processor: VisionProcessor, name: str, map_CHW: Tensor, size: tuple[int, ...]) -> np.ndarray:
    """A blended map as `decode` would give it, at the photograph's own size."""
    if map_CHW.shape[1:] != size:
        map_CHW = F.interpolate(map_CHW[None], size, mode="bilinear", align_corners=False, antialias=True)[0]
    kind = processor.task(name).kind
    if kind == "segmentation":
        return map_CHW.argmax(0).numpy()
    if kind == "normals":
        return F.normalize(map_CHW, dim=0, eps=1e-6).numpy()
    return map_CHW[0].numpy()


@torch.no_grad()
def _logits(model: MultiTaskModel, values_BCHW: Tensor, tasks: Sequence[str]) -> dict[str, Tensor]:
    found = model(pixel_values=values_BCHW.to(model.device), tasks=list(tasks)).logits
    return {name: values.float().cpu() for name, values in found.items()}


def _scaled(processor: VisionProcessor, height: int, width: int) -> tuple[int, int]:
    """The size at which windows are cut: the photograph's own, or larger if it does not hold one."""
    h, w = processor.image_size
    scale = max(1.0, h / height, w / width)
    return max(h, round(height * scale)), max(w, round(width * scale))


def _corners(processor: VisionProcessor, height: int, width: int) -> list[tuple[int, int]]:
    """Top left corners of windows that cover a photograph, at even distances."""
    starts = []
    for side, window in zip((height, width), processor.image_size, strict=True):
        step = max(1, int(window * (1 - OVERLAP)))
        count = 1 + -(-(side - window) // step)
        starts.append([round(i * (side - window) / max(1, count - 1)) for i in range(count)])
    return [(y, x) for y in starts[0] for x in starts[1]]


def _rise(side: int) -> Tensor:
    """Weights along a window's side: up and down as a squared cosine, above 0 everywhere."""
    place = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    return torch.sin(torch.pi * place).square().clamp_min(1e-3)


def predict_files(
    folder: str | Path,
    inputs: Sequence[str | Path],
    output: str | Path,
    tasks: str | Sequence[str] | None = None,
    batch_size: int = WINDOWS,
    progress: bool = True,
) -> list[Path]:
    """Writes what a saved model says of pictures, and tells which files it wrote.

    Maps of dense tasks are drawn. What other tasks say, one answer for a picture, is a line of JSON for each, with
    `picture`, its path, and the columns of `VisionProcessor.decode`.

    Args:
        folder: a folder, zoo name or Hub id.
        inputs: pictures, or folders of them.
        output: a picture (`.png`, `.jpg`, ...), in which an answer that is no map is written below, or an array `.npy`
            of what `predict_picture` gives (of several labels: their probabilities), for one picture and one task;
            `.jsonl` for tasks that are not dense, of any number of pictures; any other name is a folder, for
            `<picture>-<task>.png` of dense tasks and `answers.jsonl` of all others.
        tasks: which; only what they need is loaded.
        batch_size: windows per forward pass.
        progress: show a bar over a large photograph's windows, if the error stream is a terminal.

    Raises:
        UnknownTaskError, DataError: before anything is written.
        FileNotFoundError: there is no folder for the output.
    """
    where, output = resolve(folder), Path(output)
    paths = pictures_in(inputs)
    config = model_config(where)
    names = check_task_names(tasks, config.task_names)
    dense = [task.name for task in config.parsed_tasks if task.dense and task.name in names]
    told = [name for name in names if name not in dense]
    lines = output.suffix.lower() == ".jsonl"
    if lines and dense:
        raise DataError(f"output: expected a folder or a picture for maps, of {', '.join(dense)}, found {output.name}")
    single = output.suffix.lower() in (*SUFFIXES, ".npy")
    if single and (len(paths) > 1 or len(names) > 1):
        what = f"{len(paths)} picture{'s' * (len(paths) > 1)} and the task{'s' * (len(names) > 1)} {', '.join(names)}"
        raise DataError(f"output: expected a folder for {what}, found {output.name}")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"output: there is no folder {output.parent}")
    if output.exists() and output.is_dir() == (single or lines):
        raise DataError(f"output: expected {'a file' if single or lines else 'a folder'}, found otherwise: {output}")
    drawn = names if single else dense
    targets = {(p, name): output if single else output / f"{p.stem}-{name}.png" for p in paths for name in drawn}
    stems: dict[str, Path] = {}
    for p in paths if drawn else []:
        if stems.setdefault(p.stem, p) != p:
            raise DataError(
                f"pictures: expected names that differ by more than their ending, found {stems[p.stem]}, {p}"
            )
    for path in paths:
        pixels_of(path)  # what cannot be read is told before the work
    model = AutoModelForMultiTask.from_pretrained(where, tasks=names)
    processor = VisionProcessor.from_pretrained(where)
    if not single and not lines:
        output.mkdir(exist_ok=True)
    written, answers = [], []
    for path in paths:
        pixels_HWC = pixels_of(path)
        windows = count_windows(processor, *pixels_HWC.shape[:2])
        show = progress and sys.stderr.isatty() and windows > 1
        with tqdm(total=windows, unit="window", desc=path.name, disable=not show) as bar:
            found = predict_picture(model, processor, pixels_HWC, names, batch_size, bar.update)
        for name in drawn:
            target, content, answer = targets[path, name], io.BytesIO(), _answer(processor, name, found)
            if target.suffix.lower() == ".npy":
                np.save(content, answer, allow_pickle=False)
            else:
                picture = processor.draw(pixels_HWC, name, answer)
                picture.save(content, Image.registered_extensions()[target.suffix.lower()])
            write_atomically(target, content.getvalue())
            written.append(target)
        columns = {key: values for key, values in found.items() if key.partition("/")[0] in told}
        answers.append({"picture": str(path)} | {key: np.asarray(values).tolist() for key, values in columns.items()})
    if told and not single:
        written.append(output if lines else output / ANSWERS)
        write_atomically(written[-1], "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in answers))
    return written


def _answer(processor: VisionProcessor, name: str, found: dict[str, np.ndarray]) -> np.ndarray:
    """What was found of one task, in one array."""
    if processor.task(name).kind != "multilabel":
        return found[name]
    return np.array([found[f"{name}/{of}"] for of in processor.class_names(name)])


def model_config(folder: Path) -> MultiTaskConfig:
    """The config of a saved model of pictures. Raises DataError for a model of something else."""
    cls = model_class(read_config(folder)["model_type"])
    if cls.processor_class is not VisionProcessor:
        raise DataError(f"{folder}: expected a model of pictures, found {cls.config_class.model_type}, one of tables")
    return cls.config_class.from_pretrained(folder)
