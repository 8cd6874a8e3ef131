"""Imports run downward only, floor by floor; `import moe_mtl` costs nothing; a paper fits a file that one can read."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "moe_mtl"
# Names of one floor may use each other and every floor before them.
FLOORS = [
    {"naming", "files", "stored"},
    {"ops", "data", "kinds", "tasks", "outputs", "hub", "checkpoint", "upload"},
    {"layers"},
    {"models", "tuners", "parallel"},
    {"pathway", "serving"},
    {"inspection"},
    {"training"},
    {"cards", "bench"},
    {"cli"},
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def imported(file: Path) -> set[str]:
    """The parts of moe_mtl that a file imports, wherever in the file."""
    inside = ("moe_mtl", *file.relative_to(PACKAGE).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(inside[: len(inside) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("moe_mtl.")}


def test_imports_run_downward() -> None:
    files = [file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py"]
    assert len(files) > 20
    for file in files:
        part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        assert part in FLOOR_OF, f"{part} is on no floor: give it one in {Path(__file__).name}"
        for name in imported(file) & FLOOR_OF.keys():
            assert FLOOR_OF[name] <= FLOOR_OF[part], f"{file.relative_to(PACKAGE)} imports {name} from a higher floor"


def loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in run.stdout.split()}


def test_importing_the_package_and_the_command_line_loads_no_torch() -> None:
    for statement in ("import moe_mtl; dir(moe_mtl)", "import moe_mtl.cli", "import moe_mtl.training.recipe"):
        assert not loaded_by(statement) & {"torch", "transformers", "pandas", "datasets", "sklearn"}, statement


def test_public_names_load_on_use() -> None:
    import moe_mtl

    assert set(moe_mtl.__all__) <= set(dir(moe_mtl))
    assert all(getattr(moe_mtl, name).__name__ == name for name in moe_mtl.__all__)


def test_a_paper_is_at_most_400_lines() -> None:
    for file in (PACKAGE / "models").glob("*.py"):
        assert len(file.read_text().splitlines()) <= 400, file.name
