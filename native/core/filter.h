/* The name filter: which names may exist. Written by the owner, read here.
 *
 *   64-byte header: 8 B "KVFSNAM1", u64 slot_count (a power of two), u64 is_complete, u64 seed
 *   slot_count x u64: hashes, 0 = empty, linear probing, insert-only
 *
 * hash = XXH3-64(parent u64 LE || name bytes, seed), 0 stored as 1. A name that is not in a
 * complete filter does not exist. Thread-safety: any thread. */
#ifndef CORE_FILTER_H
#define CORE_FILTER_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct filter {
    pthread_rwlock_t lock; /* of the mapping, against its replacement */
    const uint8_t *map;    /* NULL: none */
    size_t map_bytes;
    uint64_t slot_count;
    uint64_t negative_ms;
};

int filter_create(struct filter *filter);
void filter_destroy(struct filter *filter);

/* Map a filter in the place of the earlier one; the descriptor stays the caller's. 0 or -errno. */
int filter_install(struct filter *filter, int fd, uint64_t nbytes, uint64_t negative_ms);
void filter_remove(struct filter *filter);

/* Whether a name surely does not exist, and for how long that may be remembered. */
bool filter_excludes(struct filter *filter, uint64_t parent, const char *name, size_t length,
                     uint64_t *negative_ms);

#endif
