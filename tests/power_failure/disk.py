"""A disk that loses at a power failure what was not synced, replayed from what file_log.c wrote down.

What a file holds is on the disk when the file was synced after its last write. A name in a folder (made, renamed,
removed) is on the disk when the folder was synced; until then it may be or may not be there, whatever became of other
names, for file systems reorder such changes. Only the two halves of a rename come together, and the changes of one
name in order. POSIX promises no more.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

MAX_PENDING = 12


class File:
    """A file.

    Args:
        born: How many marks came before it.
    """

    def __init__(self, born: int) -> None:
        self.born = born
        self.data = b""
        """The beginning of each write."""
        self.synced_data = b""
        self.is_synced = True
        """An empty new file has nothing to lose but its name."""

    def write(self, data: bytes) -> None:
        self.data += data
        self.is_synced = False

    def truncate(self) -> None:
        self.data, self.is_synced = b"", False

    def sync(self) -> None:
        self.synced_data, self.is_synced = self.data, True


class Folder:
    """A folder: its names now, those that surely are on the disk, and the changes since."""

    def __init__(self) -> None:
        self.names: dict[str, Node] = {}
        self._durable: dict[str, Node] = {}
        self._pending: list[dict[str, Node | None]] = []

    def change(self, change: dict[str, Node | None]) -> None:
        self.names = _apply(self.names, change)
        self._pending.append(change)

    def sync(self) -> None:
        self._durable, self._pending = dict(self.names), []

    def after_crash(self) -> Iterator[dict[str, Node]]:
        """Yield every set of names that may be found when the power fails now."""
        assert len(self._pending) <= MAX_PENDING, self._pending
        states: list[tuple[dict[str, Node], frozenset[str]]] = [(self._durable, frozenset())]
        for change in self._pending:
            lost = [(names, blocked | change.keys()) for names, blocked in states]
            kept = [(_apply(names, change), blocked) for names, blocked in states if not blocked & change.keys()]
            states = lost + kept
        return (names for names, _ in states)

    def possible(self, name: str) -> list[Node | None]:
        """Return what a name may mean when the power fails now."""
        return [self._durable.get(name), *(change[name] for change in self._pending if name in change)]

    def certain(self, name: str) -> Node | None:
        """Return what a name surely means when the power fails now; None if that is not sure."""
        first, *others = self.possible(name)
        return None if any(other is not first for other in others) else first

    def all_names(self) -> set[str]:
        return {*self._durable, *(name for change in self._pending for name in change)}


Node = File | Folder


class Disk:
    """A folder that is on the disk, and what was done in it so far.

    Args:
        root: The folder, empty when the log begins.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self.top = Folder()
        self.marks: list[str] = []

    def replay(self, log: Path) -> Iterator[list[str]]:
        """Do what the log says, line by line; yield each line when it is done: the power may fail there."""
        for line in log.read_text().splitlines():
            fields = line.split("\t")
            self._do(*fields)
            yield fields

    def find(self, path: str) -> Node | None:
        """Return what a path means now."""
        return self._walk(Path(path).parts)

    def certain(self, path: str) -> Node | None:
        """Return what a path surely means when the power fails now, with all folders above it."""
        node: Node | None = self.top
        for name in Path(path).parts:
            node = node.certain(name) if isinstance(node, Folder) else None
        return node

    def _do(self, operation: str, path: str, argument: str = "", data: str = "") -> None:
        if operation == "mark":
            self.marks.append(path)
            return
        if path.endswith(" (deleted)"):
            return
        *above, name = Path(path).relative_to(self._root).parts or ("",)
        folder = self._walk(above)
        assert isinstance(folder, Folder), path
        node = folder.names.get(name) if name else folder
        if operation in ("mkdir", "remove"):
            folder.change({name: Folder() if operation == "mkdir" else None})
        elif operation == "rename":
            assert Path(argument).parent == Path(path).parent, "renames from folder to folder are not in the model"
            folder.change({name: None, Path(argument).name: node})
        elif operation == "open" and node is None:
            folder.change({name: File(len(self.marks))})
        elif operation == "sync":
            assert node is not None, path
            node.sync()
        elif operation == "write":
            assert isinstance(node, File), path
            node.write(bytes.fromhex(data))
        elif operation == "truncate" or (operation == "open" and argument.endswith("t")):
            assert isinstance(node, File), path
            node.truncate()
        else:
            assert operation == "open", operation

    def _walk(self, parts: tuple[str, ...] | list[str]) -> Node | None:
        node: Node | None = self.top
        for name in parts:
            node = node.names.get(name) if isinstance(node, Folder) else None
        return node


def _apply(names: dict[str, Node], change: dict[str, Node | None]) -> dict[str, Node]:
    return {name: node for name, node in {**names, **change}.items() if node is not None}
