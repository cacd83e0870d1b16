/* A reserved address range into which extents of files are mapped read-only.
 *
 * The range is readable from the start (zeroes) and stays so: a part that could not be mapped, or
 * that faults later, reads as zeroes. The fault is noted.
 *
 * Thread-safety: functions on one mapping are not to be called at the same time; the bytes may be
 * read all the while. Errors are -errno. */
#ifndef KVFS_MAPPING_H
#define KVFS_MAPPING_H

#include <stddef.h>
#include <stdint.h>

enum { KVFS_PAGE = 4096 };

/* Largest mapping and alignment; above, address arithmetic could overflow. */
#define KVFS_MAPPING_BYTES_MAX ((uint64_t)1 << 46)

struct kvfs_range;

struct kvfs_mapping {
    uintptr_t address;
    size_t nbytes;       /* as asked for */
    size_t mapped_bytes; /* rounded up to KVFS_PAGE */
    struct kvfs_range *range;
};

/* Reserve. REQUIRES: align is a power of two >= KVFS_PAGE; 0 < nbytes, align <= the maximum;
 * kvfs_guard_install() succeeded. */
int kvfs_mapping_create(struct kvfs_mapping *mapping, size_t nbytes, size_t align);

void kvfs_mapping_destroy(struct kvfs_mapping *mapping);

/* Extents: positions, offsets, lengths uint64[count], fds int32[count]. */
struct kvfs_extents {
    const void *positions;
    const void *fds;
    const void *offsets;
    const void *lengths;
    size_t count;
};

/* Why the extents cannot be mapped at all (alignment, bounds), a static text; NULL if they can. */
const char *kvfs_mapping_fault(const struct kvfs_mapping *mapping,
                               const struct kvfs_extents *extents);

/* Map extents shared and read-only, neighbours in file and range as one.
 * On failure those before stay mapped, the failed one reads as zeroes.
 * REQUIRES: kvfs_mapping_fault() is NULL. */
int kvfs_mapping_map(struct kvfs_mapping *mapping, const struct kvfs_extents *extents);

/* Back a part with private writable memory. REQUIRES: position is a multiple of KVFS_PAGE and
 * position + nbytes <= mapped_bytes, nbytes > 0. */
int kvfs_mapping_map_anonymous(struct kvfs_mapping *mapping, size_t position, size_t nbytes);

/* Make the whole range read-only. */
int kvfs_mapping_protect(struct kvfs_mapping *mapping);

#endif
