/* Copying, hashing and verifying batches of memory ranges.
 *
 * Arrays: targets, sources (addresses) and lengths are uint64[count]; digests uint8[count][16];
 * statuses int32[count]. Addresses are trusted to be mapped (a wrong one is a SIGSEGV); ranges
 * that end past the address space get -EFAULT. SIGBUS becomes KVFS_FAULT, and the target of that
 * item is then undefined. Each function returns how many statuses are not 0.
 *
 * Thread-safety: any thread; the caller keeps the arrays and the memory.
 * REQUIRES: kvfs_guard_install() succeeded; targets do not overlap their sources. */
#ifndef KVFS_COPY_H
#define KVFS_COPY_H

#include <stddef.h>
#include <stdint.h>

struct kvfs_copy_batch {
    const void *targets; /* not used by kvfs_verify */
    const void *sources;
    const void *lengths;
    void *digests; /* written by kvfs_copy_hash, read by the others */
    void *statuses;
    size_t count;
};

/* Copy with non-temporal stores and write the digests. After each item zeroes are written up to
 * the next multiple of pad_to of its length. A store fence ends the batch. REQUIRES: pad_to > 0. */
size_t kvfs_copy_hash(const struct kvfs_copy_batch *batch, uint64_t pad_to);

/* Copy; compare with digests unless they are NULL. */
size_t kvfs_copy_verify(const struct kvfs_copy_batch *batch);

/* Compare with digests. */
size_t kvfs_verify(const struct kvfs_copy_batch *batch);

#endif
