/* io_uring by its raw system calls: push operations, submit them together, pop what is done.
 *
 * Thread-safety: none of its own; one thread at a time. */
#ifndef KVFS_URING_H
#define KVFS_URING_H

#include "io_op.h"

#include <stddef.h>

struct kvfs_uring;

/* Open a ring of `depth` operations. Returns 0 or -errno: ENOSYS, EPERM (seccomp, or the sysctl
 * io_uring_disabled), EOPNOTSUPP (a kernel before 5.11), ENOMEM. */
int kvfs_uring_open(unsigned depth, struct kvfs_uring **ring);

/* Pin a buffer once instead of at every operation. Returns 0 or -errno: ENOMEM beyond
 * RLIMIT_MEMLOCK. */
int kvfs_uring_register(struct kvfs_uring *ring, void *address, size_t nbytes);

/* Prepare an operation; the kernel sees it at the next enter.
 * REQUIRES: fewer than `depth` operations are pushed and not popped. */
void kvfs_uring_push(struct kvfs_uring *ring, uint64_t tag, const struct kvfs_io_op *op);

/* Submit all that was pushed; with is_waiting wait until one is done, or for timeout_ms (< 0: no
 * end). Returns 0, -ETIME, or what broke the ring. EINTR is retried. */
int kvfs_uring_enter(struct kvfs_uring *ring, bool is_waiting, int timeout_ms);

/* Take the tag and the result (bytes or -errno) of one that is done; false: none is. */
bool kvfs_uring_pop(struct kvfs_uring *ring, uint64_t *tag, int32_t *result);

/* Close. The memory of operations under way must stay: the kernel may still write to it. */
void kvfs_uring_close(struct kvfs_uring *ring);

#endif
