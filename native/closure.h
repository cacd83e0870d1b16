/* Closing a set of blocks over their descendants.
 *
 * Thread-safety: pure; the caller owns the arrays. */
#ifndef KVFS_CLOSURE_H
#define KVFS_CLOSURE_H

#include <stddef.h>
#include <stdint.h>

/* Set dropped[j] for every row j whose parent key (not all-zero) is the key of a dropped row,
 * transitively. keys, parents: uint8[count][32]; dropped: uint8[count].
 * Returns how many rows are dropped in the end, or -ENOMEM. O(count).
 * REQUIRES: count < 2^32 - 1. */
int64_t kvfs_closure(const uint8_t *keys, const uint8_t *parents, uint8_t *dropped, size_t count);

#endif
