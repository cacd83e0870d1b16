#include "summary.h"

#include "batch.h"
#include "guard.h"
#include "hash.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum {
    CHECKSUM_AT = KVFS_ENTRY_BYTES - 8,
    OFFSET_AT = 64,
    STORED_BYTES_AT = 72,
    PAGE = 4096,
    GROUP = PAGE / KVFS_ENTRY_BYTES, /* entries copied out at a time */
};

void kvfs_sign_entries(uint8_t *entries, size_t count, uint64_t seed)
{
    const struct kvfs_hash_ops *ops = kvfs_hash_ops();
    for (size_t i = 0; i < count; i++) {
        uint8_t *entry = entries + i * KVFS_ENTRY_BYTES;
        uint64_t checksum = ops->hash64(entry, CHECKSUM_AT, seed);
        memcpy(entry + CHECKSUM_AT, &checksum, sizeof checksum);
    }
}

/* A copy out of memory that may fault. */
struct fetch {
    uint8_t *target;
    const uint8_t *source;
    size_t nbytes;
};

static void fetch_body(void *argument)
{
    const struct fetch *fetch = argument;
    memcpy(fetch->target, fetch->source, fetch->nbytes);
}

static void fetch_group(uint8_t *target, const uint8_t *source, size_t count)
{
    struct fetch all = {target, source, count * KVFS_ENTRY_BYTES};
    if (kvfs_guard_run(fetch_body, &all))
        return;
    for (size_t i = 0; i < count; i++) {
        struct fetch one = {target + i * KVFS_ENTRY_BYTES, source + i * KVFS_ENTRY_BYTES,
                            KVFS_ENTRY_BYTES};
        if (!kvfs_guard_run(fetch_body, &one))
            memset(one.target, 0, KVFS_ENTRY_BYTES); /* counts as bad */
    }
}

static bool is_zero(const uint8_t *data, size_t nbytes)
{
    uint64_t any = 0;
    for (size_t i = 0; i < nbytes / sizeof any; i++)
        any |= kvfs_get64(data, i);
    return any == 0;
}

static int keep(struct kvfs_scan *scan, const uint8_t *entry, uint64_t index)
{
    if (scan->found == scan->room) {
        size_t room = scan->room == 0 ? 256 : scan->room * 2;
        uint8_t *entries = realloc(scan->entries, room * KVFS_ENTRY_BYTES);
        if (entries == NULL)
            return -ENOMEM;
        scan->entries = entries;
        uint8_t *indices = realloc(scan->indices, room * sizeof(uint32_t));
        if (indices == NULL)
            return -ENOMEM;
        scan->indices = indices;
        scan->room = room;
    }
    uint32_t index32 = (uint32_t)index;
    memcpy(scan->entries + scan->found * KVFS_ENTRY_BYTES, entry, KVFS_ENTRY_BYTES);
    memcpy(scan->indices + scan->found * sizeof index32, &index32, sizeof index32);
    scan->found++;
    scan->end_index = index + 1;
    return 0;
}

/* The end of the payload, rounded up to a page; saturates, for the numbers may be anything. */
static uint64_t payload_end(const uint8_t *entry)
{
    uint64_t offset, stored;
    memcpy(&offset, entry + OFFSET_AT, sizeof offset);
    memcpy(&stored, entry + STORED_BYTES_AT, sizeof stored);
    if (stored > UINT64_MAX - (PAGE - 1) || offset > UINT64_MAX - stored - (PAGE - 1))
        return UINT64_MAX;
    return offset + ((stored + PAGE - 1) & ~(uint64_t)(PAGE - 1));
}

/* How many entries lie above the high-water mark. */
static uint64_t entries_above(const struct kvfs_scan *scan, uint64_t high_water)
{
    uint64_t all = scan->nbytes / KVFS_ENTRY_BYTES;
    if (high_water == UINT64_MAX)
        return 0;
    if (high_water <= scan->payload_limit)
        return all;
    uint64_t below = high_water - scan->payload_limit;
    return below >= scan->nbytes ? 0 : (scan->nbytes - below) / KVFS_ENTRY_BYTES;
}

int kvfs_scan_entries(struct kvfs_scan *scan)
{
    const struct kvfs_hash_ops *ops = kvfs_hash_ops();
    bool is_sealed = scan->entry_count >= 0;
    uint64_t high_water = 0;
    uint64_t limit = is_sealed ? (uint64_t)scan->entry_count : entries_above(scan, 0);
    uint8_t group[PAGE];
    for (uint64_t first = 0; first < limit; first += GROUP) {
        size_t count = limit - first < GROUP ? (size_t)(limit - first) : GROUP;
        /* Entries grow downwards: the last of the group lies lowest. */
        fetch_group(group, scan->summary + scan->nbytes - (first + count) * KVFS_ENTRY_BYTES,
                    count);
        if (is_zero(group, count * KVFS_ENTRY_BYTES))
            continue;
        for (uint64_t i = 0; i < count && first + i < limit; i++) {
            const uint8_t *entry = group + (count - 1 - i) * KVFS_ENTRY_BYTES;
            if (is_zero(entry, KVFS_ENTRY_BYTES) ||
                kvfs_get64(entry + CHECKSUM_AT, 0) != ops->hash64(entry, CHECKSUM_AT, scan->seed))
                continue;
            if (keep(scan, entry, first + i) != 0)
                return -ENOMEM;
            uint64_t end = payload_end(entry);
            high_water = end > high_water ? end : high_water;
            if (!is_sealed)
                limit = entries_above(scan, high_water);
        }
    }
    return 0;
}

void kvfs_scan_free(struct kvfs_scan *scan)
{
    free(scan->entries);
    free(scan->indices);
    scan->entries = NULL;
    scan->indices = NULL;
}
