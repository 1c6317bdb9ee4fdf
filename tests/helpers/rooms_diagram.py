"""docs/images/rooms.svg, drawn from the table of tests/unit/test_import_direction.py.

    python -m tests.helpers.rooms_diagram

A room stands above every room it may import; an arrow leaves out what others imply.
"""

from __future__ import annotations

from tests.helpers.paths import REPOSITORY
from tests.unit.test_import_direction import ALLOWED

PICTURE = REPOSITORY / "docs" / "images" / "rooms.svg"
WIDTH, ROW, BOX_WIDTH, BOX_HEIGHT = 760, 74, 112, 34
_HIDDEN = {"zaya_train", "__main__"}
"""The empty package and its entry, which import nothing worth a box."""


def box_of(room: str) -> str:
    """The box that stands for a room: `model_commands` is a file split off `commands`."""
    whole = room.rpartition("_")[2]
    return whole if whole in ("arguments", "commands") else room


def imports(room: str) -> set[str]:
    """Boxes that a box may import, leaves of rooms counted as the room."""
    files = [name for name in ALLOWED if box_of(name) == room]
    named = {box_of(entry.split(".")[0]) for name in files for entry in ALLOWED[name]}
    return {other for other in named if other != room and other not in _HIDDEN}


def rooms() -> list[str]:
    """Every box, from those that import nothing on."""
    boxes = {box_of(room) for room in ALLOWED if room not in _HIDDEN}
    return sorted(boxes, key=lambda room: (level(room), room))


def level(room: str) -> int:
    """One more than the highest room it may import."""
    below = [level(other) for other in imports(room)]
    return 1 + max(below) if below else 0


def arrows() -> list[tuple[str, str]]:
    """(room, room it imports), without those that follow from others."""
    found = []
    for room in rooms():
        direct = imports(room)
        implied = {far for near in direct for far in _reachable(near)}
        found += [(room, other) for other in sorted(direct - implied)]
    return found


def _reachable(room: str) -> set[str]:
    near = imports(room)
    return near.union(*(_reachable(other) for other in near)) if near else set()


def drawing() -> str:
    """The picture as SVG."""
    levels = [[room for room in rooms() if level(room) == n] for n in range(level_count())]
    places = {}
    for n, names in enumerate(levels):
        for i, name in enumerate(names):
            x = WIDTH * (i + 1) / (len(names) + 1)
            places[name] = (round(x), ROW * (len(levels) - 1 - n) + 30)
    parts = [_HEAD.format(width=WIDTH, height=ROW * len(levels) - 10)]
    for upper, lower in arrows():
        (x1, y1), (x2, y2) = places[upper], places[lower]
        parts.append(_ARROW.format(x1, y1 + BOX_HEIGHT // 2, x2, y2 - BOX_HEIGHT // 2 - 2))
    for name, (x, y) in places.items():
        left, top = x - BOX_WIDTH // 2, y - BOX_HEIGHT // 2
        parts.append(_BOX.format(left, top, BOX_WIDTH, BOX_HEIGHT, x, y + 5, name))
    return "\n".join([*parts, "</svg>"]) + "\n"


def level_count() -> int:
    """Rows of the picture."""
    return 1 + max(level(room) for room in rooms())


_HEAD = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" \
font-family="sans-serif" font-size="14">
<title>Rooms of the project; an arrow points at what a room may import</title>
<style>
text {{ fill: #24292f }} rect {{ fill: #eef3f8; stroke: #57708a }} path.a {{ stroke: #57708a }}
@media (prefers-color-scheme: dark) {{ svg {{ background: #f6f8fa }} }}
</style>
<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" \
orient="auto"><path d="M0 0 8 4 0 8z" fill="#57708a"/></marker></defs>"""
_ARROW = '<path class="a" d="M{} {}L{} {}" fill="none" marker-end="url(#tip)"/>'
_BOX = (
    '<rect x="{}" y="{}" width="{}" height="{}" rx="6"/>'
    '<text x="{}" y="{}" text-anchor="middle">{}</text>'
)


if __name__ == "__main__":
    PICTURE.write_text(drawing(), encoding="ascii")
