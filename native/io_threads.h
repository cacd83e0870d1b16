/* The interface of uring.h by threads that call preadv2 and pwritev2, for where io_uring is
 * forbidden.
 *
 * Thread-safety: one user at a time; the threads are its own. */
#ifndef KVFS_IO_THREADS_H
#define KVFS_IO_THREADS_H

#include "io_op.h"

struct kvfs_io_threads;

/* Prepare `depth` operations at a time; a thread is started when one is needed.
 * Returns 0 or -ENOMEM. */
int kvfs_io_threads_open(unsigned depth, struct kvfs_io_threads **threads);

/* Begin an operation. Returns 0, or -EAGAIN when there is no thread and none can be started.
 * REQUIRES: fewer than `depth` operations are pushed and not popped. */
int kvfs_io_threads_push(struct kvfs_io_threads *threads, uint64_t tag,
                         const struct kvfs_io_op *op);

/* Wait until one is done, or for timeout_ms (< 0: no end). Returns 0 or -ETIME. */
int kvfs_io_threads_wait(struct kvfs_io_threads *threads, int timeout_ms);

/* Take the tag and the result (bytes or -errno) of one that is done; false: none is. */
bool kvfs_io_threads_pop(struct kvfs_io_threads *threads, uint64_t *tag, int32_t *result);

/* Let what no thread has begun end with -ECANCELED. */
void kvfs_io_threads_cancel(struct kvfs_io_threads *threads);

/* End the threads and free all. REQUIRES: nothing is under way; else leave it as it is. */
void kvfs_io_threads_close(struct kvfs_io_threads *threads);

#endif
