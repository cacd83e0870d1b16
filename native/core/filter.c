#include "filter.h"

#include "guard.h"
#include "hash.h"
#include "protocol.h"

#include <errno.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/stat.h>

enum { FILTER_HEADER = 64, NAME_MAX_BYTES = 255 };
enum { SLOTS_OFFSET = 8, COMPLETE_OFFSET = 16, SEED_OFFSET = 24 };
static const char magic[8] = {'K', 'V', 'F', 'S', 'N', 'A', 'M', '1'};
#define NEGATIVE_MS_MAX UINT64_C(3600000)
/* Inodes of what the owner makes up (.kvfs) are not in the filter. */
#define VIRTUAL_INODE_MIN (UINT64_C(1) << 62)
#define FILTER_BYTES_MAX (UINT64_C(1) << 34)

int filter_create(struct filter *filter)
{
    memset(filter, 0, sizeof *filter);
    return -pthread_rwlock_init(&filter->lock, NULL);
}

void filter_destroy(struct filter *filter)
{
    filter_remove(filter);
    (void)pthread_rwlock_destroy(&filter->lock);
}

struct header {
    const uint8_t *map;
    uint64_t slot_count;
    bool is_ours;
};

static void read_header(void *argument)
{
    struct header *header = argument;
    header->is_ours = memcmp(header->map, magic, sizeof magic) == 0;
    header->slot_count = load64(header->map + SLOTS_OFFSET);
}

static bool is_plausible(const uint8_t *map, uint64_t nbytes, uint64_t *slot_count)
{
    struct header header = {.map = map};
    if (!kvfs_guard_run(read_header, &header) || !header.is_ours)
        return false;
    *slot_count = header.slot_count;
    return header.slot_count > 0 && (header.slot_count & (header.slot_count - 1)) == 0 &&
           header.slot_count <= (nbytes - FILTER_HEADER) / sizeof(uint64_t);
}

static void replace(struct filter *filter, const uint8_t *map, size_t nbytes,
                    uint64_t slot_count, uint64_t negative_ms)
{
    pthread_rwlock_wrlock(&filter->lock);
    const uint8_t *old = filter->map;
    size_t old_bytes = filter->map_bytes;
    filter->map = map;
    filter->map_bytes = nbytes;
    filter->slot_count = slot_count;
    filter->negative_ms = negative_ms;
    pthread_rwlock_unlock(&filter->lock);
    if (old != NULL)
        (void)munmap((void *)old, old_bytes);
}

int filter_install(struct filter *filter, int fd, uint64_t nbytes, uint64_t negative_ms)
{
    struct stat status;
    uint64_t slot_count;
    if (nbytes < FILTER_HEADER + sizeof(uint64_t) || nbytes > FILTER_BYTES_MAX ||
        negative_ms > NEGATIVE_MS_MAX)
        return -EINVAL;
    if (fd < 0 || fstat(fd, &status) != 0 || (uint64_t)status.st_size < nbytes)
        return -EINVAL;
    void *map = mmap(NULL, nbytes, PROT_READ, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED)
        return -errno;
    if (!is_plausible(map, nbytes, &slot_count)) {
        (void)munmap(map, nbytes);
        return -EINVAL;
    }
    replace(filter, map, nbytes, slot_count, negative_ms);
    return 0;
}

void filter_remove(struct filter *filter)
{
    replace(filter, NULL, 0, 0, 0);
}

struct probe {
    const uint8_t *map;
    uint64_t slot_count;
    uint8_t key[sizeof(uint64_t) + NAME_MAX_BYTES];
    size_t key_bytes;
    bool is_excluded;
};

static uint64_t load_shared(const uint8_t *at, memory_order order)
{
    return atomic_load_explicit((const _Atomic(uint64_t) *)(const void *)at, order);
}

static void run_probe(void *argument)
{
    struct probe *probe = argument;
    if (load_shared(probe->map + COMPLETE_OFFSET, memory_order_acquire) == 0)
        return;
    uint64_t seed = load64(probe->map + SEED_OFFSET);
    uint64_t hash = kvfs_hash_ops()->hash64(probe->key, probe->key_bytes, seed);
    if (hash == 0)
        hash = 1;
    for (uint64_t i = 0; i < probe->slot_count; i++) {
        uint64_t slot = (hash + i) & (probe->slot_count - 1);
        uint64_t found =
            load_shared(probe->map + FILTER_HEADER + slot * sizeof found, memory_order_acquire);
        if (found == hash)
            return;
        if (found == 0) {
            probe->is_excluded = true;
            return;
        }
    }
}

bool filter_excludes(struct filter *filter, uint64_t parent, const char *name, size_t length,
                     uint64_t *negative_ms)
{
    struct probe probe = {.is_excluded = false};
    if (length == 0 || length > NAME_MAX_BYTES || parent >= VIRTUAL_INODE_MIN)
        return false;
    store64(probe.key, parent);
    memcpy(probe.key + sizeof parent, name, length);
    probe.key_bytes = sizeof parent + length;
    bool is_run = false;
    pthread_rwlock_rdlock(&filter->lock);
    if (filter->map != NULL) {
        probe.map = filter->map;
        probe.slot_count = filter->slot_count;
        is_run = kvfs_guard_run(run_probe, &probe);
        *negative_ms = filter->negative_ms;
    }
    pthread_rwlock_unlock(&filter->lock);
    return is_run && probe.is_excluded;
}
