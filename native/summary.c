#include "summary.h"

#include "batch.h"
#include "guard.h"
#include "hash.h"

#include <assert.h>
#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

/* As it lies on the medium; little-endian. */
struct entry {
    uint8_t key[32];
    uint8_t parent[32];
    uint64_t offset;
    uint64_t stored_bytes;
    uint64_t logical_bytes;
    uint32_t token_count;
    uint8_t codec;
    uint8_t flags;
    uint16_t reserved;
    uint8_t payload_xxh3[16];
    uint64_t reserved2;
    uint64_t checksum;
};

static_assert(sizeof(struct entry) == KVFS_ENTRY_BYTES, "shared with python");

enum {
    CHECKSUM_AT = offsetof(struct entry, checksum),
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

/* The end of a payload, rounded up to a page; saturates, for the numbers may be anything. */
static uint64_t padded_end(uint64_t offset, uint64_t stored)
{
    if (stored > UINT64_MAX - (PAGE - 1) || offset > UINT64_MAX - stored - (PAGE - 1))
        return UINT64_MAX;
    return offset + ((stored + PAGE - 1) & ~(uint64_t)(PAGE - 1));
}

size_t kvfs_summary_bytes(size_t count)
{
    return (count * KVFS_ENTRY_BYTES + PAGE - 1) & ~(size_t)(PAGE - 1);
}

size_t kvfs_place_payloads(struct kvfs_room *room, const void *lengths, size_t count,
                           void *offsets)
{
    for (size_t i = 0; i < count; i++) {
        uint64_t end = padded_end(room->payload_end, kvfs_get64(lengths, i));
        size_t entries = kvfs_summary_bytes((size_t)room->entry_count + 1);
        if (end > room->limit || entries > room->limit - end)
            return i;
        memcpy((char *)offsets + i * sizeof end, &room->payload_end, sizeof end);
        room->payload_end = end;
        room->entry_count++;
    }
    return count;
}

void kvfs_fill_entries(uint8_t *entries, const struct kvfs_columns *columns, size_t count,
                       uint64_t seed)
{
    const struct kvfs_hash_ops *ops = kvfs_hash_ops();
    for (size_t i = 0; i < count; i++) {
        struct entry entry = {
            .offset = kvfs_get64(columns->offsets, i),
            .stored_bytes = kvfs_get64(columns->lengths, i),
            .logical_bytes = kvfs_get64(columns->lengths, i),
            .token_count = (uint32_t)kvfs_get32(columns->tokens, i),
            .flags = columns->flags[i],
        };
        memcpy(entry.key, columns->keys + i * sizeof entry.key, sizeof entry.key);
        memcpy(entry.parent, columns->parents + i * sizeof entry.parent, sizeof entry.parent);
        memcpy(entry.payload_xxh3, columns->digests + i * sizeof entry.payload_xxh3,
               sizeof entry.payload_xxh3);
        entry.checksum = ops->hash64(&entry, CHECKSUM_AT, seed);
        memcpy(entries + i * sizeof entry, &entry, sizeof entry);
    }
}

void kvfs_entry_records(const uint8_t *entries, const void *indices, size_t count,
                        const struct kvfs_record *place, uint8_t *records)
{
    struct kvfs_record record = *place;
    for (size_t i = 0; i < count; i++) {
        struct entry entry;
        uint64_t index = kvfs_get64(indices, i);
        memcpy(&entry, entries + index * sizeof entry, sizeof entry);
        memcpy(record.key, entry.key, sizeof record.key);
        record.page = (uint32_t)(entry.offset / PAGE);
        record.length = (uint32_t)entry.stored_bytes;
        record.tokens = entry.token_count;
        record.entry = (uint32_t)index;
        memcpy(records + i * sizeof record, &record, sizeof record);
    }
}

void kvfs_pack_summary(uint8_t *summary, const uint8_t *entries, size_t count)
{
    uint8_t *target = summary + kvfs_summary_bytes(count);
    for (size_t i = 0; i < count; i++) {
        target -= KVFS_ENTRY_BYTES;
        memcpy(target, entries + i * KVFS_ENTRY_BYTES, KVFS_ENTRY_BYTES);
    }
    memset(summary, 0, (size_t)(target - summary));
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
            const uint8_t *raw = group + (count - 1 - i) * KVFS_ENTRY_BYTES;
            struct entry entry;
            memcpy(&entry, raw, sizeof entry);
            if (is_zero(raw, KVFS_ENTRY_BYTES) ||
                entry.checksum != ops->hash64(raw, CHECKSUM_AT, scan->seed))
                continue;
            if (keep(scan, raw, first + i) != 0)
                return -ENOMEM;
            uint64_t end = padded_end(entry.offset, entry.stored_bytes);
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
