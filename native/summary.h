/* Summary entries: 128 bytes, the last 8 an XXH3-64 of the 120 before (kvfs/engine/format.py).
 *
 * Thread-safety: any thread. REQUIRES (scan): kvfs_guard_install() succeeded. */
#ifndef KVFS_SUMMARY_H
#define KVFS_SUMMARY_H

#include <stddef.h>
#include <stdint.h>

enum { KVFS_ENTRY_BYTES = 128 };

/* Fill the checksums in place. REQUIRES: entries holds count * 128 writable bytes. */
void kvfs_sign_entries(uint8_t *entries, size_t count, uint64_t seed);

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
