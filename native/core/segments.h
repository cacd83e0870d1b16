/* Segments: the descriptors that hold stored bytes, mapped when first read.
 *
 * Thread-safety: segments_add, segments_find, segments_drop and the references are for any thread;
 * the mapping and the descriptor stay as long as a reference is held. */
#ifndef CORE_SEGMENTS_H
#define CORE_SEGMENTS_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { SEGMENT_BUCKETS = 4096, SEGMENTS_MAX = 1 << 20 };

struct segment {
    struct segment *next;
    uint32_t ref;
    int fd;
    uint64_t nbytes;
    uint64_t map_bytes;
    atomic_uint users; /* the table, and each block of an installed file */
    _Atomic(uint8_t *) map; /* NULL: not yet, or it failed */
    atomic_bool is_unmappable;
    _Atomic(_Atomic(uint64_t) *) verified; /* one bit per 4 KiB; NULL: none yet */
};

struct segments {
    pthread_mutex_t lock;
    struct segment *buckets[SEGMENT_BUCKETS];
    unsigned count;
};

int segments_create(struct segments *segments);
void segments_destroy(struct segments *segments);

/* Keep a descriptor under a number. Takes the descriptor only if it returns 0. */
int segments_add(struct segments *segments, uint32_t ref, int fd, uint64_t nbytes,
                 uint64_t map_bytes);

/* A reference for the caller, or NULL. */
struct segment *segments_find(struct segments *segments, uint32_t ref);

/* Forget a number; what uses the segment keeps it. 0 or -ENOENT. */
int segments_drop(struct segments *segments, uint32_t ref);
void segments_drop_all(struct segments *segments);

void segment_release(struct segment *segment);

/* Where the segment is mapped, or NULL if it cannot be. */
const uint8_t *segment_map(struct segments *segments, struct segment *segment);

bool segment_is_verified(struct segment *segment, uint64_t offset);
void segment_set_verified(struct segment *segment, uint64_t offset);

#endif
