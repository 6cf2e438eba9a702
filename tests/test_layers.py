"""Who may import whom: a room of `sdpo/` imports only rooms below it, and there is no circle.

Imports inside functions and under TYPE_CHECKING count.
"""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
# Lowest first. Rooms of one level do not know each other, but for losses, which common knows not.
ORDER = (
    ("common",),
    ("losses",),
    ("config", "tinyworld"),
    ("models",),
    ("data",),
    ("training",),
    ("evaluation",),
    ("lab",),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
FILES = {
    ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((REPO / "sdpo").rglob("*.py"))
}


def imports(module: str) -> set[str]:
    """The modules of this repository that a file names in its imports."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{module}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in names}
    return {name for name in found if name.split(".")[0] in ("sdpo", "eval", "prompts", "scripts")}


def room(module: str) -> str | None:
    """common, losses, ...; None for the modules at the top of `sdpo/`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LEVEL else None


def test_every_folder_is_a_room():
    folders = {p.parent.name for p in (REPO / "sdpo").glob("*/*.py")}
    assert folders == set(LEVEL)


def test_a_room_imports_only_rooms_below_it():
    upward = [
        f"{module} ({room(module)}) imports {name}"
        for module in FILES
        if room(module)
        for name in sorted(imports(module))
        if room(name) != room(module)
        and not (room(name) and LEVEL[room(name)] < LEVEL[room(module)])
    ]
    assert upward == []


def test_no_circle_of_imports():
    graph = {module: imports(module) & FILES.keys() - {module} for module in FILES}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle
