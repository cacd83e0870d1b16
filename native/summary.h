/* Summary entries: 128 bytes, the last 8 an XXH3-64 of the 120 before (kvfs/engine/format.py).
 *
 * Thread-safety: any thread. REQUIRES (scan): kvfs_guard_install() succeeded. */
#ifndef KVFS_SUMMARY_H
#define KVFS_SUMMARY_H

#include "table.h"

#include <stddef.h>
#include <stdint.h>

enum { KVFS_ENTRY_BYTES = 128 };

/* Fill the checksums in place. REQUIRES: entries holds count * 128 writable bytes. */
void kvfs_sign_entries(uint8_t *entries, size_t count, uint64_t seed);

/* Where the next payload of a log segment goes, and how far payloads and entries may come together:
 * limit is where entry 0 ends. */
struct kvfs_room {
    uint64_t payload_end;
    uint64_t entry_count;
    uint64_t limit;
};

/* Lay out payloads one after the other, each padded to a multiple of 4096, as long as they fit with
 * their entries. Fills offsets and moves payload_end and entry_count of room; returns how many
 * fit. lengths, offsets: u64 each, of any alignment. */
size_t kvfs_place_payloads(struct kvfs_room *room, const void *lengths, size_t count,
                           void *offsets);

/* What the entries of a batch say, one item per block, of any alignment. */
struct kvfs_columns {
    const uint8_t *keys;    /* 32 bytes each */
    const uint8_t *parents; /* 32 bytes each */
    const void *offsets;    /* u64 */
    const void *lengths;    /* u64, stored and logical */
    const void *tokens;     /* u32 */
    const uint8_t *flags;
    const uint8_t *digests; /* 16 bytes each */
};

/* Write whole entries, signed. REQUIRES: entries holds count * 128 writable bytes. */
void kvfs_fill_entries(uint8_t *entries, const struct kvfs_columns *columns, size_t count,
                       uint64_t seed);

/* Make the index records of some entries. indices: i64 each; place: what all have in common
 * (device, segment, generation, flags). REQUIRES: every index is one of entries. */
void kvfs_entry_records(const uint8_t *entries, const void *indices, size_t count,
                        const struct kvfs_record *place, uint8_t *records);

/* Bytes of the summary pages that hold so many entries. */
size_t kvfs_summary_bytes(size_t count);

/* Put entries as they lie in a summary: the first one last, zeros in front up to a whole page.
 * REQUIRES: summary holds kvfs_summary_bytes(count). */
void kvfs_pack_summary(uint8_t *summary, const uint8_t *entries, size_t count);

struct kvfs_scan {
    const uint8_t *summary; /* ends where entry 0 ends */
    size_t nbytes;
    uint64_t seed;
    int64_t entry_count;   /* < 0: until the high-water mark of the payloads found */
    uint64_t payload_limit; /* segment offset at which summary begins */
    /* Results, owned by the caller: kvfs_scan_free(). */
    uint8_t *entries;  /* found * 128 bytes, in index order */
    uint8_t *indices;  /* found * uint32, little-endian */
    size_t found;
    size_t room;
    uint64_t end_index; /* highest valid index + 1 */
};

/* Collect the valid entries. Returns 0 or -ENOMEM (free it then, too).
 * Invariant: each entry is copied out before it is verified, so that it cannot change after.
 * REQUIRES: entry_count * 128 <= nbytes. */
int kvfs_scan_entries(struct kvfs_scan *scan);

void kvfs_scan_free(struct kvfs_scan *scan);

#endif
