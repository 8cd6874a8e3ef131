"""Who uses which expert, and where in a picture: measured on the test pictures, drawn from the record to the byte."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..data import ImageTable

ROUTING = "routing.svg"
PICTURES = 3
DRAWS = 20  # of a router that chooses at random
_CELL, _TILE, _GAP, _LABEL = 14, 96, 8, 110


def measure_routing(
    folders: Sequence[Path], shipped: int, rows: "ImageTable", batch_size: int
) -> dict[str, Any] | None:
    """What a record says of the experts, over the runs of all seeds; None for models without any.

    Per layer the share of each task's choices, or of its weights where every expert computes, that an expert has, in
    the shipped weights; and the mutual information between task and expert, in nats, one value per seed, beside what a
    router that chooses at random would show on as many tokens. Of a few pictures the expert with the highest weight for
    each patch, in the last layer whose tokens are patches.
    """
    import torch

    from .variants import load_trained

    found: dict[str, Any] = {}
    for number, folder in enumerate(folders):
        model = load_trained(folder)[0].eval()
        shares, tokens = _shares(model, rows, batch_size)
        if not shares:
            return None
        for layer, by_task in shares.items():
            entry = found.setdefault(layer, {"shares": {}, "information": [], "at_random": 0.0})
            entry["information"].append(round(_information(list(by_task.values())), 6))
            if number == shipped:
                entry["shares"] = {task: [round(v, 5) for v in share.tolist()] for task, share in by_task.items()}
                entry["at_random"] = round(_at_random(by_task, *tokens[layer]), 6)
        if number == shipped:
            chosen = [len(rows) * (2 * i + 1) // (2 * PICTURES) for i in range(PICTURES)]
            with torch.no_grad():
                batch = rows[torch.tensor(chosen)]
                routing = model(batch["pixel_values"], output_routing=True).routing
            pictures = _pictures(routing, batch["pixel_values"], rows.processor)
    return {"layers": found, **pictures}


def _shares(model: Any, rows: "ImageTable", batch_size: int) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """layer -> task -> `[E]`, and layer -> tokens and experts chosen per token (0: all of them)."""
    import torch

    totals: dict[str, dict[str, Any]] = {}
    tokens: dict[str, Any] = {}
    for start in range(0, len(rows), batch_size):
        with torch.no_grad():
            out = model(rows[start : start + batch_size]["pixel_values"], output_routing=True)
        for record in out.routing:
            for task, share_E in record.utilisation().items():
                number = len(record.weights[task])
                by_task = totals.setdefault(record.layer, {})
                by_task[task] = by_task.get(task, 0) + share_E.double() * number
            chosen = record.indices[task].shape[1] if record.indices else 0
            before = tokens.get(record.layer, (0, 0))[0]
            tokens[record.layer] = (before + number, chosen)
    return {layer: {t: v / v.sum() for t, v in by_task.items()} for layer, by_task in totals.items()}, tokens


def _information(shares: Sequence[Any]) -> float:
    import torch

    from ..layers.balance import mutual_information

    return float(mutual_information(torch.stack(list(shares)) / len(shares)))


def _at_random(by_task: Mapping[str, Any], tokens: int, chosen: int) -> float:
    """The mean information of routers that draw `chosen` experts per token: counts alone make it more than 0."""
    import numpy as np
    import torch

    if not chosen:
        return 0.0
    generator, experts = np.random.default_rng(0), len(next(iter(by_task.values())))
    values = []
    for _ in range(DRAWS):
        drawn = generator.binomial(tokens, chosen / experts, size=(len(by_task), experts)).astype(np.float64)
        values.append(_information(list(torch.from_numpy(drawn / drawn.sum(1, keepdims=True)))))
    return float(np.mean(values))


def _pictures(routing: Sequence[Any], pixels_BCHW: Any, processor: Any) -> dict[str, Any]:
    """The chosen pictures and, per task, the expert of each patch."""
    import torch
    from PIL import Image

    records = [record for record in routing if record.grid is not None]
    if not records:
        return {"pictures": [], "shown": ""}
    record = records[-1]
    patches = record.grid[0] * record.grid[1]
    pictures = []
    for i, pixels_CHW in enumerate(pixels_BCHW):
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))
        shown = ((pixels_CHW * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        file = io.BytesIO()
        Image.fromarray(shown).save(file, format="PNG", optimize=True)
        experts = {}
        for task, weights_NE in record.weights.items():
            first = record.indices[task][:, 0] if record.indices else weights_NE.argmax(1)
            grid = first.reshape(len(pixels_BCHW), -1)[i, -patches:].reshape(record.grid)
            experts[task] = grid.tolist()
        pictures.append({"image": base64.b64encode(file.getvalue()).decode(), "experts": experts})
    return {"pictures": pictures, "shown": record.layer}


# --- drawing ---


def colour_of(expert: int, experts: int) -> str:
    """Hues evenly apart, in two lightnesses, so that neighbours differ."""
    return f"hsl({round(360 * expert / max(experts, 1))},70%,{(42, 62)[expert % 2]}%)"


def draw(record: Mapping[str, Any]) -> str | None:
    """An SVG: per layer the share of each task's choices that an expert has, and pictures with the experts of their
    patches; None without routing."""
    routing = record.get("routing")
    if not routing:
        return None
    body: list[str] = []
    top = 20
    tasks = list(next(iter(routing["layers"].values()))["shares"])
    widest = 0
    for layer, entry in routing["layers"].items():
        experts = len(next(iter(entry["shares"].values())))
        widest = max(widest, _LABEL + experts * _CELL)
        body.append(_text(_LABEL, top - 5, f"{layer}: share of each task's choices"))
        highest = max(max(share) for share in entry["shares"].values())
        for row, (task, share) in enumerate(entry["shares"].items()):
            y = top + row * _CELL
            body.append(_text(_LABEL - 6, y + 11, task, "end"))
            for e, value in enumerate(share):
                shade = round(255 * (1 - value / highest)) if highest else 255
                fill = f"rgb({shade},{shade},255)"
                place = f'x="{_LABEL + e * _CELL}" y="{y}" width="{_CELL}" height="{_CELL}"'
                told = f"<title>{task}, expert {e}: {value:.1%}</title>"
                body.append(f'<rect {place} fill="{fill}" stroke="#dddddd">{told}</rect>')
        top += len(entry["shares"]) * _CELL + 26
    if routing["pictures"]:
        experts = len(next(iter(routing["layers"][routing["shown"]]["shares"].values())))
        body.append(_text(_GAP, top, f"{routing['shown']}: the expert with the highest weight, by patch"))
        top += 16
        for j, task in enumerate(tasks):
            body.append(_text(_GAP + (j + 1) * (_TILE + _GAP), top, task))
        top += 6
        for picture in routing["pictures"]:
            body.append(
                f'<image x="{_GAP}" y="{top}" width="{_TILE}" height="{_TILE}" style="image-rendering:pixelated" '
                f'href="data:image/png;base64,{picture["image"]}"/>'
            )
            for j, grid in enumerate(picture["experts"].values()):
                left, side = _GAP + (j + 1) * (_TILE + _GAP), _TILE / max(len(grid), len(grid[0]))
                for y, line in enumerate(grid):
                    for x, expert in enumerate(line):
                        place = f'x="{left + x * side:g}" y="{top + y * side:g}" width="{side:g}" height="{side:g}"'
                        body.append(f'<rect {place} fill="{colour_of(expert, experts)}"/>')
            top += _TILE + _GAP
        widest = max(widest, _GAP + (len(tasks) + 1) * (_TILE + _GAP))
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {widest + _GAP} {top + _GAP}" font-family="sans-serif" '
        'font-size="11">'
    )
    return "\n".join([head, f'<rect width="{widest + _GAP}" height="{top + _GAP}" fill="white"/>', *body, "</svg>", ""])


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>'
