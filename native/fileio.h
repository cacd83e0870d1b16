/* Writing and reading batches of file ranges with checksums in the same pass.
 *
 * Arrays as in copy.h; offsets are uint64[count] (bytes), fds int32[count]. EINTR and short
 * transfers are retried. A failed item does not stop the others. Each function returns how many
 * statuses are not 0. Unreadable or unwritable memory (EFAULT from the kernel, SIGBUS in the
 * hash) is KVFS_FAULT.
 *
 * Thread-safety: any thread; descriptors may be shared, the file position is not used.
 * REQUIRES: kvfs_guard_install() succeeded. */
#ifndef KVFS_FILEIO_H
#define KVFS_FILEIO_H

#include <stddef.h>
#include <stdint.h>

struct kvfs_write_batch {
    int fd;
    const void *offsets;
    const void *sources;
    const void *lengths;
    void *digests;
    void *statuses;
    size_t count;
    uint64_t pad_to; /* > 0 */
    int flags;       /* RWF_* of pwritev2 */
};

/* Hash and write in steps. After each item zeroes are written up to the next multiple of pad_to
 * of its length. */
size_t kvfs_pwrite_hash(const struct kvfs_write_batch *batch);

struct kvfs_read_batch {
    const void *fds;
    const void *offsets;
    const void *lengths;
    const void *targets;
    const void *digests; /* NULL: read only */
    void *statuses;
    size_t count;
    int flags; /* RWF_* of preadv2; RWF_NOWAIT: -EAGAIN for what is not in the page cache */
};

/* Read in steps and hash each step while it is in the cache. */
size_t kvfs_pread_verify(const struct kvfs_read_batch *batch);

#endif
