/* A ring of 16-byte access events in a memfd: one producer, one consumer, in any two processes.
 *
 * Event: device u16 | phase u8 | flags u8 | segment u32 | entry u32 | tag u32. Phases are those of
 * kvfs.phase: 0 unknown, 1 prefill, 2 decode, 3 background; the tag is 0. When the ring is full,
 * new events are counted as lost, never waited for. The other side may misbehave: positions are
 * masked, and a fill beyond the capacity empties the ring.
 *
 * Thread-safety: push and drain may run at the same time; each is serialised with itself by a
 * mutex within a process. Errors are -errno. */
#ifndef KVFS_RING_H
#define KVFS_RING_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include <pthread.h>

enum { KVFS_EVENT_BYTES = 16 };

#define KVFS_RING_CAPACITY_MAX ((uint64_t)1 << 30)

struct kvfs_ring_header;

struct kvfs_ring {
    struct kvfs_ring_header *header;
    _Atomic uint64_t *events; /* 2 words each */
    size_t mapped_bytes;
    uint64_t mask;
    int fd; /* owned */
    pthread_mutex_t push_lock;
    pthread_mutex_t drain_lock;
};

/* Make a ring for at least capacity events. */
int kvfs_ring_create(struct kvfs_ring *ring, uint64_t capacity);

/* Map the ring behind a descriptor, which is duplicated. Returns 0, -errno, or -EBADMSG with a
 * static text in *reason if it is not a sound ring. */
int kvfs_ring_attach(struct kvfs_ring *ring, int fd, const char **reason);

void kvfs_ring_destroy(struct kvfs_ring *ring);

/* Events lost since the ring was made. */
uint64_t kvfs_ring_lost(const struct kvfs_ring *ring);

/* Note the access of index records (uint8[count][64]; those of length 0 are skipped). */
void kvfs_ring_push(struct kvfs_ring *ring, const uint8_t *records, size_t count, uint8_t phase,
                    uint32_t tag);

/* How many events wait. */
size_t kvfs_ring_fill(const struct kvfs_ring *ring);

/* Take the oldest events, at most limit; returns how many. */
size_t kvfs_ring_drain(struct kvfs_ring *ring, uint8_t *events, size_t limit);

#endif
