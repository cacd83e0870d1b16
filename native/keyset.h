/* Comparing lists of keys.
 *
 * Thread-safety: pure. */
#ifndef KVFS_KEYSET_H
#define KVFS_KEYSET_H

#include <stddef.h>
#include <stdint.h>

/* Fill firsts with where each key stands first, in order. keys: count x 32 bytes; firsts: room for
 * count. Returns how many distinct keys there are, or -ENOMEM. O(n).
 * REQUIRES: count < UINT32_MAX. */
int64_t kvfs_distinct_keys(const uint8_t *keys, size_t count, int64_t *firsts);

/* Find keys in a list. keys: count x 32 bytes; among: among_count x 32 bytes. positions[i] becomes
 * the first place of keys[i] in among, or -1. Returns how many were found, or -ENOMEM. O(n).
 * REQUIRES: among_count < UINT32_MAX. */
int64_t kvfs_find_keys(const uint8_t *keys, size_t count, const uint8_t *among, size_t among_count,
                       int64_t *positions);

#endif
