"""Answering questions that change the devices of a pool.

Layer: L5. As `operations`, whose table has these functions.
"""

import os
from typing import TYPE_CHECKING

from kvfs import device_changes
from kvfs.admin import messages as msg
from kvfs.admin.messages import printable
from kvfs.config import parse_device_url
from kvfs.errors import UsageError
from kvfs.pool import Pool

if TYPE_CHECKING:
    from kvfs.admin.operations import Owner

_STEP_BYTES_MAX = 1 << 30


def device_add(pool: Pool, owner: "Owner", question: msg.DeviceAdd) -> msg.DeviceAddAnswer:
    """Add a device, or say how it would be."""
    del owner
    row = device_changes.add_device(pool, os.fsdecode(question.url), is_dry=question.is_dry)
    url = parse_device_url(row.url)
    return msg.DeviceAddAnswer(
        name=row.name,
        url=printable(row.url),
        kind=url.kind,
        tier=row.tier,
        capacity_bytes=url.size_bytes,
        segment_bytes=url.segment_bytes,
        is_added=not question.is_dry,
    )


def device_set(pool: Pool, owner: "Owner", question: msg.DeviceSet) -> msg.DeviceSetAnswer:
    """Take a device into service, or out of it."""
    del owner
    device_changes.set_online(pool, question.name, is_online=question.is_online)
    return msg.DeviceSetAnswer(question.name, "online" if question.is_online else "offline")


def device_evacuate(
    pool: Pool, owner: "Owner", question: msg.DeviceEvacuate
) -> msg.DeviceEvacuateAnswer:
    """Move some of what a device holds, or say how much there is.

    Raises:
        UsageError: Too much for one answer.
    """
    del owner
    if not 0 < question.nbytes <= _STEP_BYTES_MAX:
        raise UsageError(f"nbytes must be 1 to {_STEP_BYTES_MAX}, found {question.nbytes}")
    device = device_changes.find_device(pool, question.name)
    raw_files = len(device.device.raw_files())
    if question.is_dry:
        with pool.store.state.lock:
            segments = list(device.segments.values())
        return msg.DeviceEvacuateAnswer(
            question.name, 0, 0, len(segments), sum(s.live_bytes for s in segments), 0, raw_files
        )
    done = device_changes.evacuate(pool, question.name, question.nbytes)
    return msg.DeviceEvacuateAnswer(
        name=question.name,
        moved_blocks=done.moved_blocks,
        moved_bytes=done.moved_bytes,
        left_segments=done.left_segments,
        left_bytes=done.left_bytes,
        held_segments=done.held_segments,
        raw_files=raw_files,
    )


def device_remove(pool: Pool, owner: "Owner", question: msg.DeviceRemove) -> msg.DeviceRemoveAnswer:
    """Remove a device, or say what that would lose."""
    del owner
    url = device_changes.find_device(pool, question.name).info.url
    if question.is_dry:
        found = device_changes.would_remove(pool, question.name)
    else:
        found = device_changes.remove(pool, question.name, allow_data_loss=question.allow_data_loss)
    return msg.DeviceRemoveAnswer(
        pool_name=pool.name,
        name=question.name,
        url=printable(url),
        live_bytes=found.live_bytes,
        block_count=found.block_count,
        lost_blocks=found.lost_blocks,
        is_removed=not question.is_dry,
    )
