"""Results as text and as a picture."""

import importlib.util
import io
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_atomically


def write(result: Mapping[str, Any], output: str | None, drawing: bytes | None = None) -> None:
    """`<bench>.json`, and `<bench>.svg` where there is a drawing, into the folder `output`; nothing without one."""
    if output is None:
        return
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{result['bench']}.json", json.dumps(result, indent=1) + "\n")
    if drawing is not None:
        write_atomically(folder / f"{result['bench']}.svg", drawing)


def require_known(options: object, known: Mapping[str, Iterable[object]]) -> None:
    """Each named option holds at least one value, and only known ones.

    Raises:
        ValueError: names the option, what is known, and what it holds.
    """
    for name, values in known.items():
        found, allowed = list(getattr(options, name)), list(values)
        if not found or set(found) - set(allowed):
            raise ValueError(f"{name}: expected some of {', '.join(map(str, allowed))}, found {found}")


def to_stderr(line: str) -> None:
    """A step of a measurement that prints its table on standard output."""
    print(line, file=sys.stderr, flush=True)


def table(result: dict[str, Any]) -> str:
    """The tables that `moe-mtl bench tabular` prints: one per part."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    machine = result["machine"]
    lines = [versions, f"{machine['cpu']}, {machine['threads']} threads, Python {machine['python']}"]
    for part in ("latency", "training"):
        if not result.get(part):
            continue
        names = list(result[part][0]["results"])
        unit = "microseconds per call" if part == "latency" else "rows per second, whole epoch with loading"
        lines += ["", f"{part}: {unit}; in brackets the time as a multiple of {names[0]}", ""]
        header = ["model", "tasks", "batch", *names, "floor", "/ floor"]
        rows = []
        for row in result[part]:
            cells = [row["model"], str(row["tasks"]), str(row["batch"])]
            for name in names:
                figure = row["results"][name]
                value = figure["median"] * 1e6 if part == "latency" else figure["rows_per_second"]
                cells.append(f"{value:,.0f} ({figure['ratio_to_ours']:.2f})")
            floor = row["floor"] * 1e6 if part == "latency" else row["floor_rows_per_second"]
            rows.append([*cells, f"{floor:,.0f}", f"{row['results'][names[0]]['ratio_to_floor']:.2f}"])
        lines += aligned(header, rows)
        lines += ["", "parameters of each, so that the same work is visible", ""]
        seen: dict[tuple[str, int], list[str]] = {}
        for row in result[part]:
            counts = [f"{row['results'][name]['parameters']:,}" for name in names]
            seen[row["model"], row["tasks"]] = [row["model"], str(row["tasks"]), *counts]
        lines += aligned(["model", "tasks", *names], list(seen.values()))
    if result.get("memory"):
        names = list(result["memory"][0]["results"])
        lines += ["", "peak memory of a process that trains, MiB; in brackets what came after rows and libraries", ""]
        rows = []
        for row in result["memory"]:
            cells = [row["model"], str(row["batch"])]
            for name in names:
                figure = row["results"][name]
                cells.append(f"{figure['peak'] / 2**20:,.0f} ({figure['above_imports'] / 2**20:,.0f})")
            rows.append(cells)
        lines += aligned(["model", "batch", *names], rows)
    return "\n".join(lines)


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for cells in (header, *rows):
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        lines.append("  ".join(padded).rstrip())
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def plot(result: dict[str, Any]) -> bytes | None:
    """Times as multiples of ours, as an SVG; None where matplotlib is not installed or nothing was timed."""
    parts = [part for part in ("latency", "training") if result.get(part)]
    if not parts or importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4 * len(parts)), layout="constrained")
    for axes, part in zip(figure.subplots(len(parts), squeeze=False)[:, 0], parts, strict=True):
        rows = result[part]
        names = list(rows[0]["results"])
        width = 0.8 / (len(names) + 1)
        for i, name in enumerate([*names, "floor"]):
            ours = [row["results"][names[0]]["median"] for row in rows]
            if name == "floor":
                heights = [row["floor"] / own for row, own in zip(rows, ours, strict=True)]
            else:
                heights = [row["results"][name]["ratio_to_ours"] for row in rows]
            axes.bar([x + i * width for x in range(len(rows))], heights, width, label=name)
        labels = [f"{row['model']}\nT={row['tasks']} B={row['batch']}" for row in rows]
        axes.set_xticks([x + 0.4 - width / 2 for x in range(len(rows))], labels, fontsize=7)
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_ylabel(f"time, multiple of {names[0]}")
        axes.set_title(part)
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def curves(result: dict[str, Any]) -> bytes | None:
    """Loss over task correlation, one line per model, as an SVG; None where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    rows = sorted(result["correlations"], key=lambda row: row["correlation"])
    for name in result["parameters"]:
        figures = [row["models"][name]["test"] for row in rows]
        axes.errorbar(
            [row["correlation"] for row in rows],
            [f["mean"] for f in figures],
            yerr=[f["standard_error"] for f in figures],
            label=name,
            capsize=3,
        )
    axes.invert_xaxis()
    axes.set_xlabel("task correlation")
    axes.set_ylabel("mean squared error, test")
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
