#include "write_lane.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void destroy(struct lane *base)
{
    struct write_lane *lane = write_lane_of(base);
    (void)close(lane->fd);
    (void)pthread_mutex_destroy(&lane->lock);
    free(lane->digests);
    free(lane);
}

struct write_lane *write_lane_create(int fd, uint64_t credit, uint64_t stride, uint64_t start,
                                     int *status)
{
    *status = -EINVAL;
    int flags = fd < 0 ? -1 : fcntl(fd, F_GETFL);
    if (flags < 0 || (flags & O_ACCMODE) != O_RDWR || credit > (uint64_t)INT64_MAX ||
        start > (uint64_t)INT64_MAX || stride > (uint64_t)INT64_MAX)
        return NULL;
    *status = -ENOMEM;
    struct write_lane *lane = aligned_alloc(_Alignof(struct write_lane), sizeof *lane);
    if (lane == NULL)
        return NULL;
    memset(lane, 0, sizeof *lane);
    *status = -pthread_mutex_init(&lane->lock, NULL);
    if (*status != 0) {
        free(lane);
        return NULL;
    }
    lane->lane.kind = LANE_WRITE;
    lane->lane.destroy = destroy;
    lane->fd = fd;
    atomic_init(&lane->credit, credit);
    lane->stride = stride;
    lane->is_sequential = stride > 0;
    lane->start = lane->next = start;
    kvfs_hash_ops()->reset(&lane->hash.state);
    return lane;
}

/* Note the digest of a whole stride. REQUIRES: the lock. */
static void push_digest(struct write_lane *lane)
{
    if (lane->count == lane->room) {
        uint32_t room = lane->room == 0 ? 16 : 2 * lane->room;
        uint8_t *digests = room > DIGESTS_MAX
                               ? NULL
                               : realloc(lane->digests, (size_t)room * KVFS_DIGEST_BYTES);
        if (digests == NULL) {
            lane->is_sequential = false;
            return;
        }
        lane->digests = digests;
        lane->room = room;
    }
    const struct kvfs_hash_ops *ops = kvfs_hash_ops();
    ops->finish(&lane->hash.state, lane->digests + (size_t)lane->count * KVFS_DIGEST_BYTES);
    ops->reset(&lane->hash.state);
    lane->count++;
}

/* Where the first stride begins that this lane sees whole. */
static uint64_t first_hashed(const struct write_lane *lane)
{
    uint64_t part = lane->stride > 0 ? lane->start % lane->stride : 0;
    return part == 0 ? lane->start : lane->start - part + lane->stride;
}

/* REQUIRES: the lock; the bytes follow what was written. */
static void hash(struct write_lane *lane, const uint8_t *data, size_t nbytes)
{
    uint64_t first = lane->is_sequential ? first_hashed(lane) : 0;
    if (lane->is_sequential && lane->next < first) { /* of a stride that began before */
        size_t part = nbytes < first - lane->next ? nbytes : (size_t)(first - lane->next);
        data += part;
        nbytes -= part;
        lane->next += part;
    }
    while (nbytes > 0 && lane->is_sequential) {
        uint64_t left = lane->stride - lane->next % lane->stride;
        size_t part = nbytes < left ? nbytes : (size_t)left;
        kvfs_hash_ops()->update(&lane->hash.state, data, part);
        data += part;
        nbytes -= part;
        lane->next += part;
        if (lane->next % lane->stride == 0)
            push_digest(lane);
    }
}

void write_lane_note(struct write_lane *lane, uint64_t offset, const void *data, size_t nbytes)
{
    pthread_mutex_lock(&lane->lock);
    if (offset + nbytes > lane->high_water)
        lane->high_water = offset + nbytes;
    if (nbytes > 0 && offset != lane->next)
        lane->is_sequential = false;
    hash(lane, data, nbytes);
    pthread_mutex_unlock(&lane->lock);
}

void write_lane_break_hash(struct write_lane *lane)
{
    pthread_mutex_lock(&lane->lock);
    lane->is_sequential = false;
    pthread_mutex_unlock(&lane->lock);
}

void write_lane_note_failure(struct write_lane *lane)
{
    pthread_mutex_lock(&lane->lock);
    lane->is_sequential = false;
    lane->has_failed = true;
    pthread_mutex_unlock(&lane->lock);
}

void write_lane_note_size(struct write_lane *lane, uint64_t size)
{
    pthread_mutex_lock(&lane->lock);
    if (lane->high_water > size)
        lane->high_water = size;
    if (size == 0) { /* begun anew; failures are forgiven */
        lane->is_sequential = lane->stride > 0;
        lane->has_failed = false;
        lane->start = lane->next = 0;
        lane->count = 0;
        kvfs_hash_ops()->reset(&lane->hash.state);
    } else if (size < lane->next) {
        lane->is_sequential = false;
    }
    pthread_mutex_unlock(&lane->lock);
}

uint32_t write_lane_digests(struct write_lane *lane, uint32_t first, uint32_t room,
                            uint8_t *digests, struct write_summary *summary)
{
    pthread_mutex_lock(&lane->lock);
    bool has_rest = lane->stride > 0 && lane->next > first_hashed(lane) &&
                    lane->next % lane->stride > 0;
    uint32_t total = lane->is_sequential ? lane->count + has_rest : 0;
    uint32_t copied = 0;
    for (uint32_t i = first; i < total && copied < room; i++, copied++) {
        uint8_t *target = digests + (size_t)copied * KVFS_DIGEST_BYTES;
        if (i < lane->count)
            memcpy(target, lane->digests + (size_t)i * KVFS_DIGEST_BYTES, KVFS_DIGEST_BYTES);
        else
            kvfs_hash_ops()->finish(&lane->hash.state, target);
    }
    *summary = (struct write_summary){
        .high_water = lane->high_water,
        .start = lane->start,
        .end = lane->is_sequential ? lane->next : lane->start,
        .count = total,
        .is_sequential = lane->is_sequential,
        .has_failed = lane->has_failed,
    };
    pthread_mutex_unlock(&lane->lock);
    return copied;
}
