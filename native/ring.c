#include "ring.h"

#include "memory.h"
#include "table.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { HEADER_BYTES = 4096, RING_VERSION = 1, EVENTS_MIN = 16 };

#define RING_MAGIC UINT64_C(0x31474e525346564b) /* "KVFSRNG1" */

/* head and tail count events since the beginning; each on its own cache line. */
struct kvfs_ring_header {
    uint64_t magic;
    uint32_t version;
    uint32_t event_bytes;
    uint64_t capacity;
    uint8_t reserved[40];
    _Atomic uint64_t head; /* written by the producer */
    _Atomic uint64_t lost; /* written by the producer */
    uint8_t reserved2[48];
    _Atomic uint64_t tail; /* written by the consumer */
};

static_assert(offsetof(struct kvfs_ring_header, head) == 64, "shared between processes");
static_assert(offsetof(struct kvfs_ring_header, tail) == 128, "shared between processes");

static size_t ring_bytes(uint64_t capacity)
{
    return HEADER_BYTES + (size_t)capacity * KVFS_EVENT_BYTES;
}

static int map_ring(struct kvfs_ring *ring, size_t nbytes)
{
    void *mapped = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, ring->fd, 0);
    if (mapped == MAP_FAILED)
        return -errno;
    ring->header = mapped;
    ring->events = (_Atomic uint64_t *)(void *)((char *)mapped + HEADER_BYTES);
    ring->mapped_bytes = nbytes;
    pthread_mutex_init(&ring->push_lock, NULL);
    pthread_mutex_init(&ring->drain_lock, NULL);
    return 0;
}

static void unmap_ring(struct kvfs_ring *ring)
{
    if (ring->header != NULL)
        (void)munmap(ring->header, ring->mapped_bytes);
    ring->header = NULL;
    if (ring->fd >= 0)
        (void)close(ring->fd);
    ring->fd = -1;
}

int kvfs_ring_create(struct kvfs_ring *ring, uint64_t capacity)
{
    if (capacity == 0 || capacity > KVFS_RING_CAPACITY_MAX)
        return -EINVAL;
    uint64_t events = EVENTS_MIN;
    while (events < capacity)
        events *= 2;
    memset(ring, 0, sizeof *ring);
    ring->fd = kvfs_memfd("kvfs-ring", ring_bytes(events), true);
    if (ring->fd < 0)
        return ring->fd;
    int status = map_ring(ring, ring_bytes(events));
    if (status != 0) {
        unmap_ring(ring);
        return status;
    }
    ring->mask = events - 1;
    ring->header->magic = RING_MAGIC;
    ring->header->version = RING_VERSION;
    ring->header->event_bytes = KVFS_EVENT_BYTES;
    ring->header->capacity = events;
    return 0;
}

/* Check a private copy of the header against the size of the file. */
static const char *header_fault(const struct kvfs_ring_header *header, uint64_t nbytes)
{
    if (header->magic != RING_MAGIC)
        return "wrong magic";
    if (header->version != RING_VERSION || header->event_bytes != KVFS_EVENT_BYTES)
        return "unknown version";
    if (header->capacity < EVENTS_MIN || header->capacity > KVFS_RING_CAPACITY_MAX ||
        (header->capacity & (header->capacity - 1)) != 0)
        return "wrong capacity";
    if (ring_bytes(header->capacity) != nbytes)
        return "size does not match the capacity";
    return NULL;
}

static int map_sound(struct kvfs_ring *ring, const char **reason)
{
    struct stat stat;
    if (fstat(ring->fd, &stat) != 0)
        return -errno;
    int seals = fcntl(ring->fd, F_GET_SEALS);
    *reason = "not sealed against shrinking";
    if (seals < 0 || (seals & F_SEAL_SHRINK) == 0)
        return -EBADMSG;
    *reason = "too short for a header";
    if (stat.st_size < HEADER_BYTES)
        return -EBADMSG;
    int status = map_ring(ring, (size_t)stat.st_size);
    if (status != 0)
        return status;
    struct kvfs_ring_header header;
    memcpy(&header, ring->header, sizeof header);
    *reason = header_fault(&header, (uint64_t)stat.st_size);
    ring->mask = header.capacity - 1;
    return *reason == NULL ? 0 : -EBADMSG;
}

int kvfs_ring_attach(struct kvfs_ring *ring, int fd, const char **reason)
{
    memset(ring, 0, sizeof *ring);
    ring->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (ring->fd < 0)
        return -errno;
    int status = map_sound(ring, reason);
    if (status != 0)
        unmap_ring(ring);
    return status;
}

void kvfs_ring_destroy(struct kvfs_ring *ring)
{
    unmap_ring(ring);
    pthread_mutex_destroy(&ring->push_lock);
    pthread_mutex_destroy(&ring->drain_lock);
}

uint64_t kvfs_ring_lost(const struct kvfs_ring *ring)
{
    return atomic_load_explicit(&ring->header->lost, memory_order_relaxed);
}

void kvfs_ring_push(struct kvfs_ring *ring, const uint8_t *records, size_t count, uint8_t phase,
                    uint32_t tag)
{
    pthread_mutex_lock(&ring->push_lock);
    uint64_t head = atomic_load_explicit(&ring->header->head, memory_order_relaxed);
    uint64_t tail = atomic_load_explicit(&ring->header->tail, memory_order_acquire);
    uint64_t lost = 0;
    for (size_t i = 0; i < count; i++) {
        struct kvfs_record record;
        memcpy(&record, records + i * KVFS_RECORD_BYTES, sizeof record);
        if (record.length == 0)
            continue;
        /* A tail that makes no sense looks like a full ring. */
        if (head - tail > ring->mask) {
            lost++;
            continue;
        }
        _Atomic uint64_t *event = ring->events + (head & ring->mask) * 2;
        uint64_t flags = record.flags & UINT8_MAX;
        uint64_t first = record.device | (uint64_t)phase << 16 | flags << 24 |
                         (uint64_t)record.segment << 32;
        atomic_store_explicit(&event[0], first, memory_order_relaxed);
        atomic_store_explicit(&event[1], record.entry | (uint64_t)tag << 32,
                              memory_order_relaxed);
        head++;
    }
    atomic_store_explicit(&ring->header->head, head, memory_order_release);
    if (lost > 0)
        atomic_store_explicit(&ring->header->lost, kvfs_ring_lost(ring) + lost,
                              memory_order_relaxed);
    pthread_mutex_unlock(&ring->push_lock);
}

size_t kvfs_ring_fill(const struct kvfs_ring *ring)
{
    uint64_t head = atomic_load_explicit(&ring->header->head, memory_order_acquire);
    uint64_t tail = atomic_load_explicit(&ring->header->tail, memory_order_relaxed);
    uint64_t fill = head - tail;
    return fill > ring->mask + 1 ? 0 : (size_t)fill;
}

size_t kvfs_ring_drain(struct kvfs_ring *ring, uint8_t *events, size_t limit)
{
    pthread_mutex_lock(&ring->drain_lock);
    uint64_t head = atomic_load_explicit(&ring->header->head, memory_order_acquire);
    uint64_t tail = atomic_load_explicit(&ring->header->tail, memory_order_relaxed);
    uint64_t fill = head - tail;
    size_t taken = 0;
    if (fill > ring->mask + 1)
        tail = head; /* positions that cannot be: start afresh */
    else
        taken = fill < limit ? (size_t)fill : limit;
    for (size_t i = 0; i < taken; i++) {
        const _Atomic uint64_t *event = ring->events + ((tail + i) & ring->mask) * 2;
        uint64_t words[2] = {atomic_load_explicit(&event[0], memory_order_relaxed),
                             atomic_load_explicit(&event[1], memory_order_relaxed)};
        memcpy(events + i * KVFS_EVENT_BYTES, words, sizeof words);
    }
    atomic_store_explicit(&ring->header->tail, tail + taken, memory_order_release);
    pthread_mutex_unlock(&ring->drain_lock);
    return taken;
}
