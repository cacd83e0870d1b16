"""Answering an administrator's questions about an open pool.

Layer: L5.

- Each function takes the pool and a question and returns the answer; none prints, prompts or keeps
  anything.
- What changes something takes a plan made before, and leaves alone what has changed since.

Concurrency: any thread; the pool serialises what must be.
"""

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from kvfs import __version__
from kvfs.admin import messages as msg
from kvfs.admin.messages import printable
from kvfs.engine.catalog_schema import ROOT_NODE_ID, NamespaceInfo, Node, NodeState, Origin
from kvfs.engine.segment_table import page_round
from kvfs.errors import NotFoundError, UsageError
from kvfs.pool import Pool
from kvfs.units import format_bytes

_log = logging.getLogger("kvfs.admin")


@dataclass(frozen=True, slots=True)
class Owner:
    """The process that answers. `mount`: where the pool is mounted, empty if it is not."""

    command: str = ""
    mount: str = ""
    opened_ns: int = 0


def answer(pool: Pool, owner: Owner, question: msg.Request) -> Any:
    """Answer one question; the type of the answer is `messages.ANSWERS[type(question)]`.

    Raises:
        KvfsError: As the function for the question says.
    """
    return _HANDLERS[type(question)](pool, owner, question)


def hello(pool: Pool, owner: Owner, question: msg.Hello) -> msg.HelloAnswer:
    """Say who owns the pool."""
    del question
    return msg.HelloAnswer(
        kvfs_version=__version__,
        pid=os.getpid(),
        command=owner.command,
        pool_name=pool.name,
        pool_uuid=str(pool.uuid),
        pool_path=printable(str(pool.path)),
        mount=owner.mount,
        opened_ns=owner.opened_ns,
    )


def device_list(pool: Pool, owner: Owner, question: msg.DeviceList) -> msg.DeviceListAnswer:
    """List the devices, in order of their number."""
    del owner, question
    return msg.DeviceListAnswer(pool.name, _devices(pool))


def _devices(pool: Pool) -> list[msg.DeviceAnswer]:
    uuids = {device.info.index: str(device.info.uuid) for device in pool.store.state.devices}
    return [
        msg.DeviceAnswer(
            index=found.index,
            name=found.name,
            kind=found.kind,
            tier=found.tier,
            state=found.state,
            url=found.url,
            uuid=uuids[found.index],
            is_persistent=found.is_persistent,
            capacity_bytes=found.capacity_bytes,
            used_bytes=found.used_bytes,
            live_bytes=found.live_bytes,
            segment_bytes=found.segment_bytes,
            segment_count=found.segment_count,
            block_count=found.block_count,
            bytes_written=found.bytes_written,
            failures=found.failures,
            persistence=found.persistence,
            bad_bytes=found.bad_bytes,
        )
        for found in pool.statistics().devices
    ]


def pool_status(pool: Pool, owner: Owner, question: msg.PoolStatus) -> msg.PoolStatusAnswer:
    """Return figures and what is wrong."""
    del question
    figures = pool.statistics()
    devices = _devices(pool)
    clients, segments, revocations, _ = pool.client_figures()
    return msg.PoolStatusAnswer(
        pool_name=figures.name,
        pool_uuid=figures.uuid,
        pool_path=printable(figures.path),
        state=figures.state,
        mount=owner.mount,
        owner_pid=os.getpid() if owner.command else 0,
        owner_command=owner.command,
        opened_ns=owner.opened_ns,
        namespaces=figures.namespaces,
        contexts=figures.contexts,
        capacity_bytes=figures.capacity_bytes,
        used_bytes=figures.used_bytes,
        live_bytes=figures.live_bytes,
        devices=devices,
        counters=figures.counters,
        problems=list(_problems(pool, devices, figures.counters)),
        clients=clients,
        client_segments=segments,
        client_revocations=revocations,
    )


def _problems(
    pool: Pool, devices: list[msg.DeviceAnswer], counters: dict[str, int]
) -> Iterator[str]:
    yield from pool.recovery.problems
    for device in devices:
        if device.state == "offline":
            yield f"device {device.name} is out of service after {device.failures} failures"
        elif device.failures:
            yield f"device {device.name} failed {device.failures} writes or persists"
        elif device.state != "online":
            yield f"device {device.name} is {device.state}: a segment takes no more writes"
    bad = counters.get("checksum_errors", 0) + counters.get("media_errors", 0)
    if bad:
        yield f"{bad} blocks could not be read back and were dropped"
    if pool.catalog.is_poisoned:
        yield "the catalog takes no more writes after a failure; reopen the pool"


def context_list(pool: Pool, owner: Owner, question: msg.ContextList) -> msg.ContextListAnswer:
    """List contexts by path.

    Raises:
        NotFoundError: There is no such namespace.
    """
    del owner
    start, prefix = ROOT_NODE_ID, ""
    if question.namespace:
        info = pool.namespace(os.fsdecode(question.namespace)).info
        start, prefix = info.root_node_id, f"{info.name}/"
    spaces = {info.namespace_id: info for info in pool.namespaces()}
    found: list[msg.ContextAnswer] = []
    for path, node in _walk(pool, start, prefix):
        if node.state is not NodeState.ACTIVE:
            continue
        if len(found) >= question.limit:
            return msg.ContextListAnswer(found, is_truncated=True)
        found.append(_context(path, node, spaces.get(node.namespace_id)))
    return msg.ContextListAnswer(found)


def _walk(pool: Pool, node_id: int, prefix: str) -> Iterator[tuple[str, Node]]:
    """Yield path and node of every context below a directory."""
    after = ""
    while page := pool.catalog.children(node_id, after):
        for node in page:
            if node.is_directory:
                yield from _walk(pool, node.node_id, f"{prefix}{node.name}/")
            else:
                yield f"{prefix}{node.name}", node
        after = page[-1].name


def _context(path: str, node: Node, space: NamespaceInfo | None) -> msg.ContextAnswer:
    return msg.ContextAnswer(
        node_id=node.node_id,
        name=printable(path),
        namespace=printable(space.name) if space is not None else "",
        origin="file" if node.origin is Origin.FILE else "api",
        size_bytes=node.size_bytes,
        blocks=node.block_count,
        tokens=node.token_count,
        is_pinned=node.is_pinned,
        modified_ns=node.mtime_ns,
    )


def _find(pool: Pool, name: bytes) -> tuple[str, Node]:
    """Return path and node of a context.

    Raises:
        NotFoundError: There is none of that name.
    """
    path = os.fsdecode(name).strip("/")
    node = pool.catalog.resolve(ROOT_NODE_ID, path) if path else None
    if node is None or node.is_directory or node.state is not NodeState.ACTIVE:
        raise NotFoundError(
            f"no such context: {printable(path)!r}; 'kvfs-admin context list' shows their names"
        )
    return path, node


def context_show(pool: Pool, owner: Owner, question: msg.ContextShow) -> msg.ContextShowAnswer:
    """Describe one context.

    Raises:
        NotFoundError: There is none of that name.
    """
    del owner
    path, node = _find(pool, question.name)
    spaces = {info.namespace_id: info for info in pool.namespaces()}
    space = spaces[node.namespace_id]
    keys = pool.catalog.keys(node.node_id)
    records = pool.store.lookup(node.namespace_id, keys)
    places = []
    for device in pool.store.state.devices:
        here = records[(records["device"] == device.info.index) & (records["length"] > 0)]
        if len(here):
            stored = int(page_round(here["length"]).sum())
            places.append(msg.PlaceAnswer(device.info.name, device.info.tier, len(here), stored))
    missing = np.flatnonzero(records["length"] == 0)
    return msg.ContextShowAnswer(
        context=_context(path, node, space),
        resident_blocks=int(missing[0]) if len(missing) else len(keys),
        block_tokens=space.layout.block_tokens,
        block_bytes=space.layout.block_bytes,
        layout=space.layout.to_json(),
        fingerprint=space.fingerprint.hex(),
        retention=space.retention,
        first_key=keys[0].tobytes().hex() if len(keys) else "",
        last_key=keys[-1].tobytes().hex() if len(keys) else "",
        places=places,
    )


def context_drop_plan(pool: Pool, owner: Owner, question: msg.ContextDropPlan) -> msg.DropPlan:
    """Plan to drop contexts; changes nothing.

    Raises:
        NotFoundError: One of the names does not exist.
        UsageError: No name, or one given twice.
    """
    del owner
    items: dict[int, msg.DropItem] = {}
    for name in question.names:
        path, node = _find(pool, name)
        if node.node_id in items:
            raise UsageError(f"context given twice: {printable(path)!r}")
        items[node.node_id] = msg.DropItem(
            node_id=node.node_id,
            name=printable(path),
            version=node.version,
            mtime_ns=node.mtime_ns,
            blocks=node.block_count,
            size_bytes=node.size_bytes,
            is_pinned=node.is_pinned,
        )
    if not items:
        raise UsageError("no context given")
    return msg.DropPlan(list(items.values()))


def context_drop(pool: Pool, owner: Owner, question: msg.ContextDrop) -> msg.ContextDropAnswer:
    """Remove the names of a plan. Durability: persist.

    Blocks of files go at once, when nobody reads them; others stay as cache until evicted.
    """
    del owner
    dropped: list[str] = []
    skipped: list[str] = []
    nbytes = 0
    for item in question.plan.items:
        try:
            node = pool.catalog.node(item.node_id)
        except NotFoundError:
            skipped.append(item.name)
            continue
        if node.is_directory or (node.version, node.mtime_ns) != (item.version, item.mtime_ns):
            skipped.append(item.name)
            continue
        pool.files.remove(node)
        nbytes += node.size_bytes
        dropped.append(item.name)
    pool.sync()
    _log.info("dropped %d contexts, %s", len(dropped), format_bytes(nbytes))
    return msg.ContextDropAnswer(dropped, skipped)


_HANDLERS: Final[dict[type[msg.Request], Callable[[Pool, Owner, Any], Any]]] = {
    msg.Hello: hello,
    msg.PoolStatus: pool_status,
    msg.DeviceList: device_list,
    msg.ContextList: context_list,
    msg.ContextShow: context_show,
    msg.ContextDropPlan: context_drop_plan,
    msg.ContextDrop: context_drop,
}
assert _HANDLERS.keys() == msg.ANSWERS.keys() - {msg.TakeOver}  # kvfs.control answers that
