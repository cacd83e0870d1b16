#include "segments.h"

#include "protocol.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

int segments_create(struct segments *segments)
{
    memset(segments, 0, sizeof *segments);
    return -pthread_mutex_init(&segments->lock, NULL);
}

void segments_destroy(struct segments *segments)
{
    segments_drop_all(segments);
    (void)pthread_mutex_destroy(&segments->lock);
}

static struct segment **find_link(struct segments *segments, uint32_t ref)
{
    struct segment **link = &segments->buckets[ref % SEGMENT_BUCKETS];
    while (*link != NULL && (*link)->ref != ref)
        link = &(*link)->next;
    return link;
}

int segments_add(struct segments *segments, uint32_t ref, int fd, uint64_t nbytes,
                 uint64_t map_bytes)
{
    if (fd < 0 || map_bytes == 0 || map_bytes > nbytes || nbytes > (uint64_t)INT64_MAX)
        return -EINVAL;
    struct segment *segment = calloc(1, sizeof *segment);
    if (segment == NULL)
        return -ENOMEM;
    segment->ref = ref;
    segment->fd = fd;
    segment->nbytes = nbytes;
    segment->map_bytes = map_bytes;
    atomic_init(&segment->users, 1);
    int status = 0;
    pthread_mutex_lock(&segments->lock);
    struct segment **link = find_link(segments, ref);
    if (*link != NULL) {
        status = -EEXIST;
    } else if (segments->count >= SEGMENTS_MAX) {
        status = -ENFILE;
    } else {
        *link = segment;
        segments->count++;
    }
    pthread_mutex_unlock(&segments->lock);
    if (status != 0)
        free(segment);
    return status;
}

struct segment *segments_find(struct segments *segments, uint32_t ref)
{
    pthread_mutex_lock(&segments->lock);
    struct segment *segment = *find_link(segments, ref);
    if (segment != NULL)
        atomic_fetch_add(&segment->users, 1);
    pthread_mutex_unlock(&segments->lock);
    return segment;
}

int segments_drop(struct segments *segments, uint32_t ref)
{
    pthread_mutex_lock(&segments->lock);
    struct segment **link = find_link(segments, ref);
    struct segment *segment = *link;
    if (segment != NULL) {
        *link = segment->next;
        segments->count--;
    }
    pthread_mutex_unlock(&segments->lock);
    if (segment == NULL)
        return -ENOENT;
    segment_release(segment);
    return 0;
}

void segments_drop_all(struct segments *segments)
{
    for (size_t i = 0; i < SEGMENT_BUCKETS; i++) {
        pthread_mutex_lock(&segments->lock);
        struct segment *segment = segments->buckets[i];
        segments->buckets[i] = NULL;
        for (struct segment *at = segment; at != NULL; at = at->next)
            segments->count--;
        pthread_mutex_unlock(&segments->lock);
        while (segment != NULL) {
            struct segment *next = segment->next;
            segment_release(segment);
            segment = next;
        }
    }
}

void segment_release(struct segment *segment)
{
    if (atomic_fetch_sub(&segment->users, 1) != 1)
        return;
    uint8_t *map = atomic_load(&segment->map);
    if (map != NULL)
        (void)munmap(map, segment->map_bytes);
    free((void *)atomic_load(&segment->verified));
    (void)close(segment->fd);
    free(segment);
}

const uint8_t *segment_map(struct segments *segments, struct segment *segment)
{
    uint8_t *map = atomic_load_explicit(&segment->map, memory_order_acquire);
    if (map != NULL || atomic_load(&segment->is_unmappable))
        return map;
    pthread_mutex_lock(&segments->lock);
    map = atomic_load(&segment->map);
    if (map == NULL) {
        void *made = mmap(NULL, segment->map_bytes, PROT_READ, MAP_SHARED, segment->fd, 0);
        if (made == MAP_FAILED) {
            atomic_store(&segment->is_unmappable, true);
        } else {
            map = made;
            atomic_store_explicit(&segment->map, map, memory_order_release);
        }
    }
    pthread_mutex_unlock(&segments->lock);
    return map;
}

bool segment_is_verified(struct segment *segment, uint64_t offset)
{
    _Atomic(uint64_t) *bits = atomic_load_explicit(&segment->verified, memory_order_acquire);
    uint64_t bit = offset / PAGE;
    if (bits == NULL || offset % PAGE != 0)
        return false;
    return (atomic_load_explicit(&bits[bit / 64], memory_order_relaxed) >> (bit % 64)) & 1;
}

void segment_set_verified(struct segment *segment, uint64_t offset)
{
    if (offset % PAGE != 0)
        return;
    _Atomic(uint64_t) *bits = atomic_load_explicit(&segment->verified, memory_order_acquire);
    if (bits == NULL) {
        size_t words = segment->map_bytes / PAGE / 64 + 1;
        _Atomic(uint64_t) *made = calloc(words, sizeof *made);
        if (made == NULL)
            return; /* verified again next time */
        if (atomic_compare_exchange_strong(&segment->verified, &bits, made))
            bits = made;
        else
            free((void *)made);
    }
    uint64_t bit = offset / PAGE;
    atomic_fetch_or_explicit(&bits[bit / 64], UINT64_C(1) << (bit % 64), memory_order_relaxed);
}
