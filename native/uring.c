#include "uring.h"

#include <errno.h>
#include <linux/io_uring.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#ifndef IORING_SETUP_COOP_TASKRUN
#define IORING_SETUP_COOP_TASKRUN (1U << 8)
#endif

/* Head and tail are shared with the kernel: who moves one releases, who reads the other's
 * acquires. */
struct kvfs_uring {
    int fd;
    _Atomic unsigned *sq_tail, *cq_head, *cq_tail;
    unsigned sq_mask, cq_mask;
    unsigned *sq_array;
    struct io_uring_sqe *sqes;
    const struct io_uring_cqe *cqes;
    unsigned unsubmitted;
    void *rings;
    size_t rings_bytes, sqes_bytes;
};

static int setup(unsigned depth, struct io_uring_params *params)
{
    /* COOP_TASKRUN: nobody is interrupted for a completion; who waits is woken anyway. */
    static const unsigned flags[] = {IORING_SETUP_CLAMP | IORING_SETUP_COOP_TASKRUN,
                                     IORING_SETUP_CLAMP};
    long fd = -1;
    for (size_t i = 0; i < sizeof flags / sizeof flags[0]; i++) {
        *params = (struct io_uring_params){.flags = flags[i]};
        fd = syscall(SYS_io_uring_setup, depth, params);
        if (fd >= 0 || errno != EINVAL)
            break;
    }
    if (fd < 0)
        return -errno;
    unsigned needed = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_EXT_ARG;
    if ((params->features & needed) != needed || params->sq_entries < depth) {
        (void)close((int)fd);
        return -EOPNOTSUPP;
    }
    return (int)fd;
}

static void *at(void *base, unsigned offset)
{
    return (char *)base + offset;
}

static int map(struct kvfs_uring *ring, const struct io_uring_params *params)
{
    size_t sq_bytes = params->sq_off.array + params->sq_entries * sizeof(unsigned);
    size_t cq_bytes = params->cq_off.cqes + params->cq_entries * sizeof(struct io_uring_cqe);
    ring->rings_bytes = sq_bytes > cq_bytes ? sq_bytes : cq_bytes;
    ring->sqes_bytes = params->sq_entries * sizeof(struct io_uring_sqe);
    ring->rings = mmap(NULL, ring->rings_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE,
                       ring->fd, IORING_OFF_SQ_RING);
    if (ring->rings == MAP_FAILED)
        return -errno;
    void *sqes = mmap(NULL, ring->sqes_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE,
                      ring->fd, IORING_OFF_SQES);
    if (sqes == MAP_FAILED)
        return -errno;
    ring->sqes = sqes;
    ring->sq_tail = at(ring->rings, params->sq_off.tail);
    ring->cq_head = at(ring->rings, params->cq_off.head);
    ring->cq_tail = at(ring->rings, params->cq_off.tail);
    ring->sq_mask = *(unsigned *)at(ring->rings, params->sq_off.ring_mask);
    ring->cq_mask = *(unsigned *)at(ring->rings, params->cq_off.ring_mask);
    ring->sq_array = at(ring->rings, params->sq_off.array);
    ring->cqes = at(ring->rings, params->cq_off.cqes);
    return 0;
}

int kvfs_uring_open(unsigned depth, struct kvfs_uring **opened)
{
    struct io_uring_params params;
    struct kvfs_uring *ring = calloc(1, sizeof *ring);
    if (ring == NULL)
        return -ENOMEM;
    ring->rings = MAP_FAILED;
    ring->fd = setup(depth, &params);
    int status = ring->fd < 0 ? ring->fd : map(ring, &params);
    if (status != 0) {
        kvfs_uring_close(ring);
        return status;
    }
    *opened = ring;
    return 0;
}

int kvfs_uring_register(struct kvfs_uring *ring, void *address, size_t nbytes)
{
    struct iovec buffer = {address, nbytes};
    long status = syscall(SYS_io_uring_register, ring->fd, IORING_REGISTER_BUFFERS, &buffer, 1);
    return status < 0 ? -errno : 0;
}

void kvfs_uring_push(struct kvfs_uring *ring, uint64_t tag, const struct kvfs_io_op *op)
{
    /* Only this thread moves the tail, and the kernel takes all of them at each enter. */
    unsigned tail = atomic_load_explicit(ring->sq_tail, memory_order_relaxed);
    unsigned index = tail & ring->sq_mask;
    struct io_uring_sqe *sqe = &ring->sqes[index];
    memset(sqe, 0, sizeof *sqe);
    if (op->is_fixed) /* of the one registered buffer, index 0 */
        sqe->opcode = op->is_write ? IORING_OP_WRITE_FIXED : IORING_OP_READ_FIXED;
    else
        sqe->opcode = op->is_write ? IORING_OP_WRITE : IORING_OP_READ;
    sqe->fd = op->fd;
    sqe->off = op->offset;
    sqe->addr = (uint64_t)(uintptr_t)op->data;
    sqe->len = op->nbytes;
    sqe->rw_flags = (__typeof__(sqe->rw_flags))op->flags;
    sqe->user_data = tag;
    ring->sq_array[index] = index;
    atomic_store_explicit(ring->sq_tail, tail + 1, memory_order_release);
    ring->unsubmitted++;
}

static bool is_ready(const struct kvfs_uring *ring)
{
    return atomic_load_explicit(ring->cq_head, memory_order_relaxed) !=
           atomic_load_explicit(ring->cq_tail, memory_order_acquire);
}

static long enter(struct kvfs_uring *ring, bool is_waiting, int timeout_ms)
{
    struct __kernel_timespec time = {timeout_ms / 1000, timeout_ms % 1000 * 1000000L};
    struct io_uring_getevents_arg argument = {
        .ts = timeout_ms < 0 ? 0 : (uint64_t)(uintptr_t)&time};
    unsigned flags = is_waiting ? IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG : 0;
    return syscall(SYS_io_uring_enter, ring->fd, ring->unsubmitted, is_waiting ? 1 : 0, flags,
                   is_waiting ? &argument : NULL, is_waiting ? sizeof argument : 0);
}

int kvfs_uring_enter(struct kvfs_uring *ring, bool is_waiting, int timeout_ms)
{
    for (;;) {
        bool must_wait = is_waiting && !is_ready(ring);
        if (ring->unsubmitted == 0 && !must_wait)
            return 0;
        long taken = enter(ring, must_wait, timeout_ms);
        if (taken > 0)
            ring->unsubmitted -= (unsigned)taken;
        /* EAGAIN, EBUSY: the kernel is short of memory until some of ours are done. */
        else if (taken < 0 && errno != EINTR && errno != EAGAIN && errno != EBUSY)
            return -errno;
    }
}

bool kvfs_uring_pop(struct kvfs_uring *ring, uint64_t *tag, int32_t *result)
{
    if (!is_ready(ring))
        return false;
    unsigned head = atomic_load_explicit(ring->cq_head, memory_order_relaxed);
    const struct io_uring_cqe *cqe = &ring->cqes[head & ring->cq_mask];
    *tag = cqe->user_data;
    *result = cqe->res;
    atomic_store_explicit(ring->cq_head, head + 1, memory_order_release);
    return true;
}

void kvfs_uring_close(struct kvfs_uring *ring)
{
    if (ring->sqes != NULL)
        (void)munmap(ring->sqes, ring->sqes_bytes);
    if (ring->rings != MAP_FAILED)
        (void)munmap(ring->rings, ring->rings_bytes);
    if (ring->fd >= 0)
        (void)close(ring->fd);
    free(ring);
}
