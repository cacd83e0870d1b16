/* A file that is written to a staging descriptor, hashed as it grows.
 *
 * As long as all writes come in order from the lane's start on, the XXH3-128 of each stride that
 * begins there or later is ready when the lane is closed. Bytes that others add behind them, such
 * as zeroes, change none of it. */
#ifndef CORE_WRITE_LANE_H
#define CORE_WRITE_LANE_H

#include "hash.h"
#include "lane.h"

#include <pthread.h>
#include <stddef.h>

enum { DIGESTS_MAX = 1 << 20 };

struct write_lane {
    struct hash_room {
        struct kvfs_hash_state state;
    } hash; /* first: it is aligned */
    struct lane lane;
    int fd;
    _Atomic(uint64_t) credit; /* largest end offset that needs no asking */
    uint64_t stride;          /* 0: no hashing */
    pthread_mutex_t lock;     /* all below; never held during I/O */
    bool is_sequential;
    bool has_failed;     /* a writer was told that its bytes are missing */
    uint64_t start;      /* where the first write was to go */
    uint64_t next;       /* written in order so far */
    uint64_t high_water; /* largest end offset written */
    uint8_t *digests;
    uint32_t count, room;
};

static inline struct write_lane *write_lane_of(struct lane *lane)
{
    return (struct write_lane *)(void *)((char *)lane - offsetof(struct write_lane, lane));
}

/* Takes the descriptor only if it returns a lane. */
struct write_lane *write_lane_create(int fd, uint64_t credit, uint64_t stride, uint64_t start,
                                     int *status);

/* Bytes were written here, or are on their way to the owner. */
void write_lane_note(struct write_lane *lane, uint64_t offset, const void *data, size_t nbytes);

/* What was hashed is not what the file holds. */
void write_lane_break_hash(struct write_lane *lane);

/* A write of this lane was answered with an error, and may have been done or not. */
void write_lane_note_failure(struct write_lane *lane);

/* The file has a new size. */
void write_lane_note_size(struct write_lane *lane, uint64_t size);

/* Digests of the whole strides from the first that begins at `start` or later, and of the rest. */
struct write_summary {
    uint64_t high_water;
    uint64_t start, end; /* written in order; equal if not, or if nothing was */
    uint32_t count;      /* 0: not in order, or no stride begins there */
    bool is_sequential;
    bool has_failed;
};
/* Finish, and copy digests from `first` on, at most `room`; returns how many. */
uint32_t write_lane_digests(struct write_lane *lane, uint32_t first, uint32_t room,
                            uint8_t *digests, struct write_summary *summary);

#endif
