"""The tree against a dictionary that knows the rules of POSIX."""

import contextlib
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvfs.engine.catalog import Catalog
from kvfs.engine.catalog_schema import (
    ROOT_NODE_ID,
    CrossNamespaceError,
    DirectoryNotEmptyError,
    NodeState,
    NotDirectoryError,
    Origin,
    TargetIsDirectoryError,
)
from kvfs.errors import ExistsError, KvfsError, RefusedError, UsageError
from kvfs.layout import OPAQUE

NAMES = st.one_of(
    st.sampled_from(["a", "b"]),  # often, so that names clash
    st.sampled_from(["c", "B", "\u00e9", "\udcff", "default", "tenant", "x" * 255]),
)
NAMESPACES = {"default": 11, "tenant": 22}
PICK = st.integers(0, 1 << 20)


@dataclass
class Item:
    """A node of the model."""

    parent: int
    name: str
    namespace: int
    is_directory: bool
    is_pending: bool = False


class TreeMachine(RuleBasedStateMachine):
    """Every call is predicted first: its result, or the class of its error."""

    def __init__(self) -> None:
        super().__init__()
        self.connection = sqlite3.connect(":memory:")
        self.catalog = Catalog.from_connection(self.connection)
        self.model = {ROOT_NODE_ID: Item(0, "", 0, is_directory=True)}
        self.ever: set[int] = set()
        for name, namespace in NAMESPACES.items():
            self.make_namespace(name, namespace)

    def make_namespace(self, name: str, namespace: int) -> None:
        info = self.catalog.create_namespace(namespace, name, OPAQUE, "cache", 1, 0o755, 0, 0)
        self.note(info.root_node_id, Item(ROOT_NODE_ID, name, namespace, is_directory=True))

    def note(self, node_id: int, item: Item) -> None:
        assert node_id not in self.ever
        self.ever.add(node_id)
        self.model[node_id] = item

    def pick(self, number: int, *, directory: bool | None = None) -> int:
        ids = sorted(
            node_id
            for node_id, item in self.model.items()
            if directory is None or item.is_directory is directory
        )
        return ids[number % len(ids)]

    def child(self, parent: int, name: str) -> int | None:
        for node_id, item in self.model.items():
            if (item.parent, item.name) == (parent, name):
                return node_id
        return None

    def below(self, parent: int) -> int:
        """The namespace of what is made in a directory; 0: nothing can be."""
        if parent != ROOT_NODE_ID:
            return self.model[parent].namespace
        default = self.child(ROOT_NODE_ID, "default")
        return self.model[default].namespace if default and self.is_namespace(default) else 0

    def is_namespace(self, node_id: int) -> bool:
        item = self.model[node_id]
        return item.parent == ROOT_NODE_ID and item.is_directory

    def is_empty(self, node_id: int) -> bool:
        return not any(item.parent == node_id for item in self.model.values())

    def owns_root_files(self, node_id: int) -> bool:
        namespace = self.model[node_id].namespace
        return self.is_namespace(node_id) and any(
            item.parent == ROOT_NODE_ID and not item.is_directory and item.namespace == namespace
            for item in self.model.values()
        )

    def ancestors(self, node_id: int) -> list[int]:
        found = []
        while node_id:
            found.append(node_id)
            node_id = self.model[node_id].parent
        return found

    @rule(number=PICK, name=NAMES)
    def make_directory(self, number: int, name: str) -> None:
        parent = self.pick(number)
        expected: type[KvfsError] | None = None
        if not self.model[parent].is_directory:
            expected = NotDirectoryError
        elif parent == ROOT_NODE_ID:
            expected = UsageError
        elif self.child(parent, name) is not None:
            expected = ExistsError
        with expecting(expected):
            node = self.catalog.make_directory(parent, name, mode=0o755, uid=0, gid=0, now_ns=1)
            self.note(
                node.node_id, Item(parent, name, self.model[parent].namespace, is_directory=True)
            )

    @rule(number=PICK, name=NAMES, pending=st.booleans(), stray=st.integers(0, 9))
    def create_context(self, number: int, name: str, pending: bool, stray: int) -> None:
        parent = self.pick(number)
        namespace = 22 if stray == 0 else self.below(parent)
        expected: type[KvfsError] | None = None
        if not self.model[parent].is_directory:
            expected = NotDirectoryError
        elif namespace == 0 or namespace != self.below(parent):
            expected = CrossNamespaceError
        elif self.child(parent, name) is not None:
            expected = ExistsError
        state = NodeState.PENDING if pending else NodeState.ACTIVE
        with expecting(expected):
            node = self.catalog.create_context(
                parent, name, namespace or 77, Origin.FILE, state, 0o644, 0, 0, 1
            )
            self.note(node.node_id, Item(parent, name, namespace, False, pending))
            if not pending:
                self.catalog.append_blocks(
                    node.node_id, bytes(32), block_bytes=1, stride=4096, tail_bytes=1, now_ns=1
                )

    @rule(number=PICK, names=st.lists(NAMES, min_size=1, max_size=4))
    def make_parents(self, number: int, names: list[str]) -> None:
        start = self.pick(number, directory=True)
        at, expected = start, None
        for name in names[:-1]:
            child = self.child(at, name)
            if child is None:
                expected = UsageError if at == ROOT_NODE_ID else None
                break
            if not self.model[child].is_directory:
                expected = NotDirectoryError
                break
            at = child
        with expecting(expected):
            parent, last = self.catalog.make_parents(
                start, "/".join(names), mode=0o755, uid=0, gid=0, now_ns=1
            )
            assert last == names[-1]
            at = start
            for name in names[:-1]:
                node = self.catalog.lookup(at, name)
                assert node is not None
                if node.node_id not in self.model:
                    self.note(
                        node.node_id, Item(at, name, self.model[at].namespace, is_directory=True)
                    )
                at = node.node_id
            assert parent == at

    @rule(number=PICK, to=PICK, name=NAMES, replace=st.booleans())
    def rename(self, number: int, to: int, name: str, replace: bool) -> None:
        self.move(self.pick(number), self.pick(to), name, replace)

    def move(self, node_id: int, parent: int, name: str, replace: bool) -> None:
        victim = self.child(parent, name)
        expected = self.rename_error(node_id, parent, name, replace)
        with expecting(expected):
            replaced = self.catalog.rename(node_id, parent, name, 1, replace)
            gone = victim is not None and victim != node_id
            is_context = gone and not self.model[victim or 0].is_directory
            assert replaced == (victim if is_context else None)
            if gone:
                del self.model[victim or 0]
            self.model[node_id].parent, self.model[node_id].name = parent, name

    def rename_error(
        self, node_id: int, parent: int, name: str, replace: bool
    ) -> type[KvfsError] | None:
        item, victim = self.model[node_id], self.child(parent, name)
        if not self.model[parent].is_directory:
            return NotDirectoryError
        if node_id == ROOT_NODE_ID:
            return UsageError
        if item.is_directory and self.is_namespace(node_id) != (parent == ROOT_NODE_ID):
            return CrossNamespaceError
        if self.is_namespace(node_id):
            if name != item.name and self.owns_root_files(node_id):
                return RefusedError
        elif self.below(parent) != item.namespace:
            return CrossNamespaceError
        elif node_id in self.ancestors(parent):
            return UsageError
        if victim is None or victim == node_id:
            return None
        return self.replace_error(item, victim, replace)

    def replace_error(self, item: Item, victim: int, replace: bool) -> type[KvfsError] | None:
        other = self.model[victim]
        if not replace:
            return ExistsError
        if item.is_directory and not other.is_directory:
            return NotDirectoryError
        if other.is_directory and not item.is_directory:
            return TargetIsDirectoryError
        if not self.is_empty(victim) or self.owns_root_files(victim):
            return DirectoryNotEmptyError
        return RefusedError if self.is_namespace(victim) else None

    @rule(number=PICK, to=PICK, name=NAMES)
    def rename_directory(self, number: int, to: int, name: str) -> None:
        """As `rename`, where it is most likely to work or to hit a directory."""
        source = self.pick(number, directory=True)
        same = [
            node_id
            for node_id, item in sorted(self.model.items())
            if item.is_directory and item.namespace == self.model[source].namespace
        ]
        self.move(source, same[to % len(same)], name, True)

    @rule(number=PICK)
    def remove(self, number: int) -> None:
        node_id = self.pick(number)
        expected: type[KvfsError] | None = None
        if node_id == ROOT_NODE_ID:
            expected = UsageError
        elif not self.is_empty(node_id) or self.owns_root_files(node_id):
            expected = DirectoryNotEmptyError
        with expecting(expected):
            assert self.catalog.remove(node_id, 1).node_id == node_id
            del self.model[node_id]

    @rule(numbers=st.lists(PICK, max_size=4))
    def remove_nodes(self, numbers: list[int]) -> None:
        ids = [self.pick(number) for number in numbers]
        gone = {node_id for node_id in ids if not self.model[node_id].is_directory}
        assert {node.node_id for node, _ in self.catalog.remove_nodes(ids)} == gone
        for node_id in gone:
            del self.model[node_id]

    @precondition(lambda self: len(self.model) > 8)
    @rule(namespace=st.sampled_from(sorted(NAMESPACES.values())))
    def drop_namespace(self, namespace: int) -> None:
        if not any(item.namespace == namespace for item in self.model.values()):
            return
        self.catalog.drop_namespace(namespace)
        self.model = {
            node_id: item for node_id, item in self.model.items() if item.namespace != namespace
        }
        name = {value: key for key, value in NAMESPACES.items()}[namespace]
        if self.child(ROOT_NODE_ID, name) is None:
            self.make_namespace(name, namespace)

    @rule()
    def reopen_after_a_crash(self) -> None:
        copy = sqlite3.connect(":memory:")
        copy.deserialize(self.connection.serialize())
        self.connection.close()
        self.connection, self.catalog = copy, Catalog.from_connection(copy)
        pending = [node_id for node_id, item in self.model.items() if item.is_pending]
        assert self.catalog.reap_pending() == len(pending)
        for node_id in pending:
            del self.model[node_id]

    @rule(number=PICK, name=NAMES)
    def abandon_a_transaction(self, number: int, name: str) -> None:
        parent = self.pick(number, directory=True)
        with contextlib.suppress(KvfsError, ZeroDivisionError), self.catalog.transaction():
            for node in self.catalog.children(parent):
                if not node.is_directory:
                    self.catalog.remove(node.node_id, 2)
            made = self.catalog.make_directory(parent, name, mode=0, uid=0, gid=0, now_ns=2)
            self.ever.add(made.node_id)
            raise ZeroDivisionError

    @invariant()
    def listings_agree(self) -> None:
        listed = 0
        for node_id, item in self.model.items():
            if not item.is_directory:
                continue
            found = [
                (node.name, node.node_id, node.namespace_id, node.is_directory)
                for node in self.catalog.children(node_id)
            ]
            expected = [
                (child.name, child_id, child.namespace, child.is_directory)
                for child_id, child in self.model.items()
                if child.parent == node_id
            ]
            expected.sort(key=lambda entry: entry[0].encode("utf-8", "surrogateescape"))
            assert found == expected
            listed += len(found)
        assert listed == len(self.model) - 1
        assert self.catalog.statistics().node_count == len(self.model)

    def teardown(self) -> None:
        assert self.catalog.check() == []
        for node_id in self.model:
            path = self.catalog.path_of(node_id)
            found = self.catalog.resolve(ROOT_NODE_ID, path)
            assert found is not None
            assert found.node_id == node_id
        self.connection.close()


@contextlib.contextmanager
def expecting(kind: type[KvfsError] | None) -> Iterator[None]:
    """Check that exactly this class of error comes, or none."""
    try:
        yield
    except KvfsError as error:
        if kind is None or type(error) is not kind:
            raise AssertionError(f"expected {kind}, found {error!r}") from error
    else:
        assert kind is None, f"expected {kind}"


TestTree = TreeMachine.TestCase
TestTree.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestTree.pytestmark = [pytest.mark.timeout(900)]  # shrinking a failure takes minutes
