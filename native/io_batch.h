/* Batches of fileio.h through a queue: n items are pieces of one queue, not n calls.
 *
 * Thread-safety: one user of a queue at a time.
 * REQUIRES: kvfs_guard_install() succeeded. */
#ifndef KVFS_IO_BATCH_H
#define KVFS_IO_BATCH_H

#include "fileio.h"
#include "io_queue.h"

/* How a batch is moved. */
struct kvfs_io_manner {
    int flags;      /* RWF_* */
    int timeout_ms; /* without any progress; < 0: no end */
    uint32_t align; /* of offsets and lengths for O_DIRECT, a power of two; 1: none */
    uint32_t address_align; /* of memory, likewise */
};

/* As kvfs_pwrite_hash. Each piece is copied to a buffer of the queue and hashed there, while the
 * others are written. After a timeout what is not done has -ETIMEDOUT, and may or may not be
 * written, now or later. REQUIRES: offsets and pad_to are multiples of the alignment. */
size_t kvfs_io_write_hash(struct kvfs_io_queue *queue, const struct kvfs_write_batch *batch,
                          const struct kvfs_io_manner *manner);

/* As kvfs_pread_verify, of any offsets and lengths. What is aligned is read straight into its
 * target, the rest through buffers; all of it if there is a timeout, so that nothing is written
 * to a target after return. */
size_t kvfs_io_read_verify(struct kvfs_io_queue *queue, const struct kvfs_read_batch *batch,
                           const struct kvfs_io_manner *manner);

#endif
