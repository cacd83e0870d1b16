#include "mapping.h"

#include "batch.h"
#include "guard.h"

#include <errno.h>
#include <stdbool.h>
#include <sys/mman.h>

static uint64_t round_up(uint64_t nbytes)
{
    return (nbytes + KVFS_PAGE - 1) & ~(uint64_t)(KVFS_PAGE - 1);
}

/* Replace a part by zeroes. Readable, not PROT_NONE: a stray read must not kill the process. */
static int reserve(uintptr_t address, size_t nbytes)
{
    void *mapped = mmap((void *)address, nbytes, PROT_READ,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    return mapped == MAP_FAILED ? -errno : 0;
}

int kvfs_mapping_create(struct kvfs_mapping *mapping, size_t nbytes, size_t align)
{
    size_t wanted = round_up(nbytes);
    size_t slack = align - KVFS_PAGE;
    void *mapped = mmap(NULL, wanted + slack, PROT_READ,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED)
        return -errno;
    uintptr_t start = (uintptr_t)mapped;
    uintptr_t address = (start + align - 1) & ~(uintptr_t)(align - 1);
    if (address > start)
        (void)munmap(mapped, address - start);
    if (start + slack > address)
        (void)munmap((void *)(address + wanted), start + slack - address);
    mapping->range = kvfs_range_add(address, wanted, align);
    if (mapping->range == NULL) {
        (void)munmap((void *)address, wanted);
        return -ENOMEM;
    }
    mapping->address = address;
    mapping->nbytes = nbytes;
    mapping->mapped_bytes = wanted;
    return 0;
}

void kvfs_mapping_destroy(struct kvfs_mapping *mapping)
{
    kvfs_range_remove(mapping->range);
    (void)munmap((void *)mapping->address, mapping->mapped_bytes);
    mapping->range = NULL;
}

const char *kvfs_mapping_fault(const struct kvfs_mapping *mapping,
                               const struct kvfs_extents *extents)
{
    for (size_t i = 0; i < extents->count; i++) {
        uint64_t position = kvfs_get64(extents->positions, i);
        uint64_t offset = kvfs_get64(extents->offsets, i);
        uint64_t length = kvfs_get64(extents->lengths, i);
        if (position % KVFS_PAGE != 0 || offset % KVFS_PAGE != 0)
            return "positions and offsets must be multiples of 4096";
        if (length == 0)
            return "lengths must be positive";
        if (length > mapping->mapped_bytes || position > mapping->mapped_bytes - round_up(length))
            return "extent reaches beyond the range";
        if (offset > (uint64_t)INT64_MAX - round_up(length))
            return "offset too large";
    }
    return NULL;
}

/* One system call's worth of extents. */
struct run {
    uint64_t position;
    uint64_t offset;
    uint64_t nbytes;
    int32_t fd;
};

static struct run run_at(const struct kvfs_extents *extents, size_t index)
{
    return (struct run){
        .position = kvfs_get64(extents->positions, index),
        .offset = kvfs_get64(extents->offsets, index),
        .nbytes = round_up(kvfs_get64(extents->lengths, index)),
        .fd = kvfs_get32(extents->fds, index),
    };
}

static bool continues(const struct run *run, const struct run *next)
{
    return next->fd == run->fd && next->offset == run->offset + run->nbytes &&
           next->position == run->position + run->nbytes;
}

static int map_run(struct kvfs_mapping *mapping, const struct run *run)
{
    uintptr_t address = mapping->address + run->position;
    void *mapped = mmap((void *)address, run->nbytes, PROT_READ, MAP_SHARED | MAP_FIXED, run->fd,
                        (off_t)run->offset);
    if (mapped != MAP_FAILED)
        return 0;
    int status = -errno;
    /* A failed MAP_FIXED may leave a hole that anybody's next mmap would fill. Without mappings
     * to spare for the part alone, the whole range becomes one. */
    if (reserve(address, run->nbytes) != 0)
        (void)reserve(mapping->address, mapping->mapped_bytes);
    return status;
}

int kvfs_mapping_map(struct kvfs_mapping *mapping, const struct kvfs_extents *extents)
{
    size_t index = 0;
    while (index < extents->count) {
        struct run run = run_at(extents, index++);
        while (index < extents->count) {
            struct run next = run_at(extents, index);
            if (!continues(&run, &next))
                break;
            run.nbytes += next.nbytes;
            index++;
        }
        int status = map_run(mapping, &run);
        if (status != 0)
            return status;
    }
    return 0;
}

int kvfs_mapping_map_anonymous(struct kvfs_mapping *mapping, size_t position, size_t nbytes)
{
    void *mapped = mmap((void *)(mapping->address + position), round_up(nbytes),
                        PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    return mapped == MAP_FAILED ? -errno : 0;
}

int kvfs_mapping_protect(struct kvfs_mapping *mapping)
{
    return mprotect((void *)mapping->address, mapping->mapped_bytes, PROT_READ) == 0 ? 0 : -errno;
}
