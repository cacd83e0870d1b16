"""Names: the rules of rename, remove and listing, beyond what the state machine walks through."""

import contextlib
import errno
import sqlite3

import pytest

from kvfs.engine.catalog import Catalog
from kvfs.engine.catalog_schema import (
    ROOT_NODE_ID,
    CrossNamespaceError,
    DirectoryNotEmptyError,
    NameTooLongError,
    Node,
    NodeState,
    NotDirectoryError,
    Origin,
    TargetIsDirectoryError,
)
from kvfs.errors import ExistsError, NotFoundError, RefusedError, UsageError
from kvfs.layout import OPAQUE

DEFAULT, TENANT = 0x1234, 0x5678


class Tree:
    """A catalog in memory with two namespaces, and short ways to fill it."""

    def __init__(self) -> None:
        self.catalog = Catalog.from_connection(sqlite3.connect(":memory:"))
        self.now = 100
        self.default = self.namespace(DEFAULT, "default")
        self.tenant = self.namespace(TENANT, "tenant")

    def namespace(self, namespace_id: int, name: str) -> int:
        return self.catalog.create_namespace(
            namespace_id, name, OPAQUE, "cache", 1, 0o755, 0, 0
        ).root_node_id

    def directory(self, parent: int, name: str) -> int:
        self.now += 1
        return self.catalog.make_directory(
            parent, name, mode=0o755, uid=1, gid=2, now_ns=self.now
        ).node_id

    def file(self, parent: int, name: str, namespace_id: int = DEFAULT) -> int:
        self.now += 1
        return self.catalog.create_context(
            parent, name, namespace_id, Origin.FILE, NodeState.ACTIVE, 0o644, 1, 2, self.now
        ).node_id

    def names(self, parent: int) -> list[str]:
        return [node.name for node in self.catalog.children(parent)]

    def at(self, path: str) -> Node | None:
        return self.catalog.resolve(ROOT_NODE_ID, path)


@pytest.fixture
def tree() -> Tree:
    return Tree()


def test_what_is_made_is_found(tree: Tree) -> None:
    made = tree.catalog.create_context(
        tree.default, "x", DEFAULT, Origin.API, NodeState.PENDING, 0o100640, 7, 8, 55
    )
    assert made == tree.catalog.lookup(tree.default, "x") == tree.catalog.node(made.node_id)
    assert (made.mode, made.uid, made.gid, made.mtime_ns, made.ctime_ns) == (0o640, 7, 8, 55, 55)
    assert (made.origin, made.state, made.version) == (Origin.API, NodeState.PENDING, 0)
    directory = tree.directory(tree.default, "d")
    assert tree.catalog.node(directory).is_directory
    assert tree.catalog.path_of(directory) == "default/d"
    assert tree.catalog.path_of(ROOT_NODE_ID) == ""
    assert tree.catalog.lookup(tree.default, "nothing") is None
    with pytest.raises(NotFoundError, match="no such node: 77"):
        tree.catalog.node(77)


def test_a_change_shows_in_the_directory_times(tree: Tree) -> None:
    first, second = tree.directory(tree.default, "1"), tree.directory(tree.default, "2")
    node = tree.file(first, "x")
    assert tree.catalog.node(first).mtime_ns == tree.now
    tree.catalog.rename(node, second, "y", 5000)
    assert [tree.catalog.node(id_).mtime_ns for id_ in (first, second)] == [5000, 5000]
    assert (tree.catalog.node(node).mtime_ns, tree.catalog.node(node).ctime_ns) == (tree.now, 5000)
    tree.catalog.remove(node)
    assert tree.catalog.node(second).mtime_ns == 5000
    assert tree.catalog.remove(tree.file(second, "z"), 6000).name == "z"
    assert tree.catalog.node(second).ctime_ns == 6000


def test_set_attributes_changes_what_is_given(tree: Tree) -> None:
    node = tree.file(tree.default, "x")
    changed = tree.catalog.set_attributes(node, mode=0o100600, now_ns=9)
    assert (changed.mode, changed.uid, changed.gid, changed.ctime_ns) == (0o600, 1, 2, 9)
    changed = tree.catalog.set_attributes(node, uid=5, gid=6, mtime_ns=-7, now_ns=10)
    assert (changed.mode, changed.uid, changed.gid, changed.mtime_ns) == (0o600, 5, 6, -7)
    assert tree.catalog.node(node) == changed


def test_listing_pages_in_byte_order(tree: Tree) -> None:
    names = ["B", "a", "a\udcff", "aa", "b", "\u00e9", "\U0001f600", "\udc80"]
    for name in names:
        tree.file(tree.default, name)
    expected = sorted(names, key=lambda name: name.encode("utf-8", "surrogateescape"))
    assert tree.names(tree.default) == expected
    found: list[str] = []
    while page := tree.catalog.children(tree.default, found[-1] if found else "", limit=3):
        assert len(page) <= 3
        found += [node.name for node in page]
    assert found == expected
    assert tree.catalog.count_children(tree.default) == len(names)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\0b", "\ud800"])
def test_bad_names_are_refused(tree: Tree, name: str) -> None:
    node = tree.file(tree.default, "x")
    with pytest.raises(UsageError):
        tree.file(tree.default, name)
    with pytest.raises(UsageError):
        tree.catalog.rename(node, tree.default, name, 1)
    assert tree.names(tree.default) == ["x"]


def test_names_have_a_length(tree: Tree) -> None:
    tree.file(tree.default, "\u00e9" * 127 + "x")
    with pytest.raises(NameTooLongError, match="at most 255 bytes, found 256") as caught:
        tree.file(tree.default, "\u00e9" * 128)
    assert caught.value.errno == errno.ENAMETOOLONG
    with pytest.raises(NameTooLongError, match="at most 4096 bytes, found 4097"):
        tree.catalog.resolve(ROOT_NODE_ID, "x" * 4097)


def test_the_status_directory_keeps_its_name(tree: Tree) -> None:
    with pytest.raises(UsageError, match="name is taken"):
        tree.namespace(9, ".kvfs")
    with pytest.raises(UsageError, match="name is taken"):
        tree.file(ROOT_NODE_ID, ".kvfs")
    tree.file(tree.default, ".kvfs")


def test_the_root_holds_namespaces_and_files_of_default(tree: Tree) -> None:
    with pytest.raises(UsageError, match="are namespaces"):
        tree.directory(ROOT_NODE_ID, "d")
    with pytest.raises(CrossNamespaceError, match="expected 0x1234, found 0x5678"):
        tree.file(ROOT_NODE_ID, "x", TENANT)
    node = tree.file(ROOT_NODE_ID, "x")
    assert tree.names(ROOT_NODE_ID) == ["default", "tenant", "x"]
    assert tree.catalog.namespace_by_name("x") is None
    tree.catalog.rename(node, tree.default, "y", 1)
    tree.catalog.rename(node, ROOT_NODE_ID, "z", 1)
    assert tree.catalog.check() == []


def test_resolve_and_make_parents(tree: Tree) -> None:
    make = {"mode": 0o700, "uid": 3, "gid": 4, "now_ns": 50}
    parent, name = tree.catalog.make_parents(tree.default, "a/b/c", **make)
    assert (tree.catalog.path_of(parent), name) == ("default/a/b", "c")
    assert tree.catalog.make_parents(tree.default, "a/b/d", **make) == (parent, "d")
    assert tree.catalog.make_parents(tree.default, "e", **make) == (tree.default, "e")
    file = tree.file(parent, "c")
    assert tree.at("default/a/b/c") == tree.catalog.node(file)
    assert tree.at("default/a/x/c") is None
    assert tree.catalog.resolve(parent, "") == tree.catalog.node(parent)
    with pytest.raises(NotDirectoryError) as caught:
        tree.at("default/a/b/c/d")
    assert caught.value.errno == errno.ENOTDIR
    before = tree.catalog.statistics().node_count
    for path, kind in (("a/b/c/d/e", NotDirectoryError), ("", UsageError), ("n/../m", UsageError)):
        with pytest.raises(kind):
            tree.catalog.make_parents(tree.default, path, **make)
    assert tree.catalog.statistics().node_count == before


def test_rename_replaces_a_context_and_says_which(tree: Tree) -> None:
    old, new = tree.file(tree.default, "old"), tree.file(tree.default, "new")
    with pytest.raises(ExistsError):
        tree.catalog.rename(new, tree.default, "old", 1, replace=False)
    assert tree.catalog.rename(new, tree.default, "new", 1) is None
    assert tree.catalog.rename(new, tree.default, "old", 1) == old
    assert tree.names(tree.default) == ["old"]


def test_rename_keeps_kinds_apart(tree: Tree) -> None:
    file, directory = tree.file(tree.default, "f"), tree.directory(tree.default, "d")
    with pytest.raises(NotDirectoryError):
        tree.catalog.rename(directory, tree.default, "f", 1)
    with pytest.raises(TargetIsDirectoryError) as caught:
        tree.catalog.rename(file, tree.default, "d", 1)
    assert caught.value.errno == errno.EISDIR
    with pytest.raises(NotDirectoryError):
        tree.catalog.rename(directory, file, "x", 1)


def test_rename_of_directories(tree: Tree) -> None:
    first, second = tree.directory(tree.default, "1"), tree.directory(tree.default, "2")
    inner = tree.directory(first, "inner")
    tree.file(inner, "x")
    for target in (first, inner):
        with pytest.raises(UsageError, match="below itself"):
            tree.catalog.rename(first, target, "y", 1)
    with pytest.raises(DirectoryNotEmptyError) as caught:
        tree.catalog.rename(second, tree.default, "1", 1)
    assert caught.value.errno == errno.ENOTEMPTY
    assert isinstance(caught.value, ExistsError)
    assert isinstance(caught.value, RefusedError)
    assert tree.catalog.rename(first, tree.default, "2", 1) is None
    assert tree.at("default/2/inner/x") is not None
    assert tree.catalog.check() == []


def test_rename_stays_in_its_namespace(tree: Tree) -> None:
    file, directory = tree.file(tree.default, "f"), tree.directory(tree.default, "d")
    for node, target in (
        (file, tree.tenant),
        (directory, tree.tenant),
        (directory, ROOT_NODE_ID),
        (tree.default, tree.tenant),
        (tree.file(tree.tenant, "t", TENANT), ROOT_NODE_ID),
    ):
        with pytest.raises(CrossNamespaceError) as caught:
            tree.catalog.rename(node, target, "x", 1)
        assert caught.value.errno == errno.EXDEV


def test_rename_of_namespaces(tree: Tree) -> None:
    tree.catalog.rename(tree.tenant, ROOT_NODE_ID, "other", 1)
    assert [info.name for info in tree.catalog.namespaces()] == ["default", "other"]
    with pytest.raises(RefusedError, match="cannot be replaced"):
        tree.catalog.rename(tree.tenant, ROOT_NODE_ID, "default", 1)
    node = tree.file(ROOT_NODE_ID, "x")
    with pytest.raises(RefusedError, match="files at the root belong to it"):
        tree.catalog.rename(tree.default, ROOT_NODE_ID, "new", 1)
    assert tree.catalog.rename(tree.default, ROOT_NODE_ID, "default", 1) is None
    with pytest.raises(NotDirectoryError):
        tree.catalog.rename(tree.tenant, ROOT_NODE_ID, "x", 1)
    tree.catalog.remove(node)
    tree.catalog.rename(tree.default, ROOT_NODE_ID, "new", 1)
    with pytest.raises(CrossNamespaceError):
        tree.file(ROOT_NODE_ID, "x")
    assert tree.catalog.check() == []


def test_the_root_stays(tree: Tree) -> None:
    with pytest.raises(UsageError):
        tree.catalog.rename(ROOT_NODE_ID, tree.default, "x", 1)
    with pytest.raises(UsageError):
        tree.catalog.remove(ROOT_NODE_ID)


def test_remove(tree: Tree) -> None:
    directory = tree.directory(tree.default, "d")
    file = tree.file(directory, "x")
    with pytest.raises(DirectoryNotEmptyError, match="directory not empty: 'd'"):
        tree.catalog.remove(directory)
    tree.catalog.remove(file)
    tree.catalog.remove(directory)
    with pytest.raises(NotFoundError):
        tree.catalog.remove(directory)
    root_file = tree.file(ROOT_NODE_ID, "r")
    with pytest.raises(DirectoryNotEmptyError, match="files at the root"):
        tree.catalog.remove(tree.default)
    tree.catalog.remove(root_file)
    tree.catalog.remove(tree.default)
    assert [info.name for info in tree.catalog.namespaces()] == ["tenant"]
    assert tree.catalog.check() == []


def test_directories_have_no_content(tree: Tree) -> None:
    for use in (
        lambda: tree.catalog.keys(tree.default),
        lambda: tree.catalog.tokens(tree.default),
        lambda: tree.catalog.set_pinned(tree.default, True),
        lambda: tree.catalog.next_version(tree.default),
    ):
        with pytest.raises(TargetIsDirectoryError):
            use()


def test_ids_are_not_reused(tree: Tree) -> None:
    first = tree.file(tree.default, "x")
    tree.catalog.remove(first)
    with contextlib.suppress(ZeroDivisionError), tree.catalog.transaction():
        tree.file(tree.default, "x")
        raise ZeroDivisionError
    assert tree.file(tree.default, "x") == first + 2
