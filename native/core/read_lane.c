#include "read_lane.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static atomic_uint blocks_in_use;

static void destroy(struct lane *base)
{
    struct read_lane *lane = (struct read_lane *)base;
    for (uint32_t i = 0; lane->blocks != NULL && i < lane->count; i++)
        if (lane->blocks[i].segment != NULL)
            segment_release(lane->blocks[i].segment);
    atomic_fetch_sub(&blocks_in_use, lane->count);
    free(lane->blocks);
    free(lane);
}

/* The blocks must cover the file, and the file must need them all. */
static bool is_plausible(uint64_t size, uint64_t stride, uint32_t count)
{
    if (size > (uint64_t)INT64_MAX)
        return false;
    if (size == 0)
        return count == 0;
    return stride > 0 && stride <= (uint64_t)INT64_MAX && (size - 1) / stride + 1 == count;
}

struct read_lane *read_lane_create(uint64_t size, uint64_t stride, uint32_t count, uint32_t flags,
                                   int *status)
{
    *status = -EINVAL;
    uint32_t deadline_ms = flags >> READ_DEADLINE_SHIFT;
    flags &= (UINT32_C(1) << READ_DEADLINE_SHIFT) - 1;
    if (!is_plausible(size, stride, count) || (flags & ~(uint32_t)(READ_VERIFY | READ_SHORT)) != 0)
        return NULL;
    *status = -ENOMEM;
    if (count > READ_BLOCKS_MAX)
        return NULL;
    if (atomic_fetch_add(&blocks_in_use, count) > READ_BLOCKS_MAX - count) {
        atomic_fetch_sub(&blocks_in_use, count);
        return NULL;
    }
    struct read_lane *lane = calloc(1, sizeof *lane);
    struct block *blocks = count > 0 ? calloc(count, sizeof *blocks) : NULL;
    if (lane == NULL || (count > 0 && blocks == NULL)) {
        atomic_fetch_sub(&blocks_in_use, count);
        free(lane);
        free(blocks);
        return NULL;
    }
    lane->lane.kind = LANE_READ;
    lane->lane.destroy = destroy;
    lane->size = size;
    lane->stride = stride;
    lane->count = count;
    lane->flags = flags;
    lane->deadline_ms = deadline_ms;
    lane->blocks = blocks;
    *status = 0;
    return lane;
}

int read_lane_set(struct read_lane *lane, uint32_t index, struct segment *segment,
                  uint64_t offset, uint64_t stored, uint32_t flags, const uint8_t *digest)
{
    if (index >= lane->count || stored > lane->stride || lane->lane.is_served)
        return -EINVAL;
    if (segment != NULL && (stored > segment->map_bytes || offset > segment->map_bytes - stored))
        return -EINVAL;
    struct block *block = &lane->blocks[index];
    if (atomic_load(&block->flags) & BLOCK_FILLED)
        return -EEXIST;
    block->segment = segment;
    block->offset = offset;
    block->stored = stored;
    memcpy(block->digest, digest, DIGEST);
    atomic_store(&block->flags, BLOCK_FILLED | (flags & BLOCK_VERIFIED));
    lane->filled++;
    return 0;
}

bool read_lane_is_complete(const struct read_lane *lane)
{
    return lane->filled == lane->count;
}
