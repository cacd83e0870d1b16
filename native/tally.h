/* Counting records by device: what metrics are made of.
 *
 * Thread-safety: the caller keeps others from the counts. */
#ifndef KVFS_TALLY_H
#define KVFS_TALLY_H

#include <stddef.h>
#include <stdint.h>

enum { KVFS_TALLY_DEVICES_MAX = 256 };

/* Add to counts[2 * d] how many of the records lie on device d, to counts[2 * d + 1] their bytes.
 * records: count x 64 bytes, see kvfs.engine.index.RECORD; a length of 0 is a miss and not counted.
 * lengths: uint64[count], counted in place of the records' own, or NULL; statuses: int32[count], a
 * record with another one than 0 is not counted, or NULL.
 * counts: devices x 2. Returns how many were counted; -1, and counts as they were, if a device's
 * number is not below `devices`. REQUIRES: devices <= KVFS_TALLY_DEVICES_MAX. */
int64_t kvfs_tally(const uint8_t *records, size_t count, const uint8_t *lengths,
                   const uint8_t *statuses, uint64_t *counts, size_t devices);

#endif
