#include "io_queue.h"

#include "io_threads.h"
#include "status.h"
#include "uring.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

struct place {
    struct kvfs_io_op op; /* what is left to do */
    uint32_t wanted;      /* of it */
    uint32_t align;
    bool is_running;
    bool is_abandoned;
};

struct kvfs_io_queue {
    struct kvfs_uring *ring; /* or */
    struct kvfs_io_threads *threads;
    uint8_t *buffers;
    size_t buffers_bytes;
    struct place *places;
    int *free_places;
    unsigned depth, free_count, running, stalled, pushed;
    bool is_registered, is_broken;
    pid_t owner;
};

static int open_way(struct kvfs_io_queue *queue, enum kvfs_io_kind kind)
{
    int status = -ENOSYS;
    if (kind != KVFS_IO_THREADS)
        status = kvfs_uring_open(queue->depth, &queue->ring);
    if (kind == KVFS_IO_THREADS || (kind == KVFS_IO_ANY && status != 0))
        status = kvfs_io_threads_open(queue->depth, &queue->threads);
    return status;
}

int kvfs_io_queue_open(unsigned depth, enum kvfs_io_kind kind, struct kvfs_io_queue **opened)
{
    struct kvfs_io_queue *queue = calloc(1, sizeof *queue);
    if (queue == NULL)
        return -ENOMEM;
    queue->depth = depth;
    queue->owner = getpid();
    queue->buffers_bytes = (size_t)depth * KVFS_IO_PIECE;
    queue->buffers = mmap(NULL, queue->buffers_bytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    queue->places = calloc(depth, sizeof *queue->places);
    queue->free_places = calloc(depth, sizeof *queue->free_places);
    int status = -ENOMEM;
    if (queue->buffers != MAP_FAILED && queue->places != NULL && queue->free_places != NULL)
        status = open_way(queue, kind);
    if (status != 0) {
        kvfs_io_queue_close(queue);
        return status;
    }
    (void)madvise(queue->buffers, queue->buffers_bytes, MADV_HUGEPAGE); /* fewer pieces per I/O */
    queue->is_registered =
        queue->ring != NULL &&
        kvfs_uring_register(queue->ring, queue->buffers, queue->buffers_bytes) == 0;
    while (queue->free_count < depth) {
        queue->free_places[queue->free_count] = (int)(depth - 1 - queue->free_count);
        queue->free_count++;
    }
    *opened = queue;
    return 0;
}

enum kvfs_io_kind kvfs_io_queue_kind(const struct kvfs_io_queue *queue)
{
    return queue->ring != NULL ? KVFS_IO_URING : KVFS_IO_THREADS;
}

bool kvfs_io_queue_is_registered(const struct kvfs_io_queue *queue)
{
    return queue->is_registered;
}

int kvfs_io_queue_take(struct kvfs_io_queue *queue)
{
    return queue->free_count > 0 ? queue->free_places[--queue->free_count] : -1;
}

uint8_t *kvfs_io_queue_buffer(const struct kvfs_io_queue *queue, int place)
{
    return queue->buffers + (size_t)place * KVFS_IO_PIECE;
}

void kvfs_io_queue_give(struct kvfs_io_queue *queue, int place)
{
    queue->free_places[queue->free_count++] = place;
}

static int begin(struct kvfs_io_queue *queue, int index)
{
    struct place *place = &queue->places[index];
    uintptr_t distance = (uintptr_t)place->op.data - (uintptr_t)queue->buffers;
    place->op.is_fixed = queue->is_registered && distance < queue->buffers_bytes;
    if (queue->ring == NULL)
        return kvfs_io_threads_push(queue->threads, (uint64_t)index, &place->op);
    kvfs_uring_push(queue->ring, (uint64_t)index, &place->op);
    queue->pushed++;
    return 0;
}

static int submit(struct kvfs_io_queue *queue)
{
    queue->pushed = 0;
    int status = queue->ring == NULL ? 0 : kvfs_uring_enter(queue->ring, false, 0);
    queue->is_broken |= status != 0;
    return status;
}

int kvfs_io_queue_push(struct kvfs_io_queue *queue, int index, const struct kvfs_io_op *op,
                       uint32_t wanted, uint32_t align)
{
    queue->places[index] = (struct place){.op = *op, .wanted = wanted, .align = align};
    int status = queue->is_broken ? -EIO : begin(queue, index);
    if (status != 0)
        return status;
    queue->places[index].is_running = true;
    queue->running++;
    /* The device is not to wait until all are prepared: that takes as long as some of them do. */
    bool is_due = queue->pushed == queue->running || queue->pushed >= (queue->depth + 7) / 8;
    if (is_due)
        (void)submit(queue); /* a broken ring is met by who waits */
    return 0;
}

/* Take note of a result; true: the operation has ended. */
static bool is_ended(struct kvfs_io_queue *queue, int index, int32_t result, int32_t *status)
{
    struct place *place = &queue->places[index];
    *status = result;
    if (result == -EINTR || result == -EAGAIN)
        result = 0;
    else if (result < 0) {
        if (result == -EFAULT)
            *status = KVFS_FAULT;
        return true;
    } else if ((uint32_t)result >= place->wanted) {
        *status = KVFS_DONE;
        return true;
    } else if (result == 0 || (uint32_t)result % place->align != 0) {
        *status = place->op.is_write ? -EIO : KVFS_SHORT_READ; /* no progress, no reason */
        return true;
    }
    if (place->is_abandoned)
        return true;
    place->op.data += result;
    place->op.offset += (uint32_t)result;
    place->op.nbytes -= (uint32_t)result;
    place->wanted -= (uint32_t)result;
    *status = begin(queue, index);
    return *status != 0;
}

/* Take what is done, but what was abandoned; -1: nothing is. */
static int pop(struct kvfs_io_queue *queue, int32_t *status)
{
    uint64_t tag;
    int32_t result;
    while (queue->ring != NULL ? kvfs_uring_pop(queue->ring, &tag, &result)
                               : kvfs_io_threads_pop(queue->threads, &tag, &result)) {
        int index = (int)tag;
        if (!is_ended(queue, index, result, status))
            continue;
        queue->places[index].is_running = false;
        if (!queue->places[index].is_abandoned) {
            queue->running--;
            return index;
        }
        queue->stalled--;
        kvfs_io_queue_give(queue, index);
    }
    return -1;
}

int kvfs_io_queue_wait(struct kvfs_io_queue *queue, int timeout_ms, int32_t *status)
{
    for (;;) {
        int index = pop(queue, status);
        if (index >= 0)
            return index;
        queue->pushed = 0;
        int failure = queue->ring != NULL ? kvfs_uring_enter(queue->ring, true, timeout_ms)
                                          : kvfs_io_threads_wait(queue->threads, timeout_ms);
        if (failure != 0) {
            queue->is_broken |= failure != -ETIME;
            return failure;
        }
    }
}

unsigned kvfs_io_queue_stalled(struct kvfs_io_queue *queue)
{
    int32_t status;
    if (queue->stalled > 0) {
        (void)submit(queue); /* enters the kernel, which hands over what is done */
        (void)pop(queue, &status);
    }
    return queue->is_broken ? queue->depth : queue->stalled;
}

void kvfs_io_queue_abandon(struct kvfs_io_queue *queue)
{
    for (unsigned i = 0; i < queue->depth; i++)
        queue->places[i].is_abandoned = queue->places[i].is_running;
    queue->stalled += queue->running;
    queue->running = 0;
    if (queue->threads != NULL) /* what has not begun would find another file by its descriptor */
        kvfs_io_threads_cancel(queue->threads);
}

void kvfs_io_queue_close(struct kvfs_io_queue *queue)
{
    if (queue->owner != getpid())
        return; /* a fork has no threads to join, and shares the ring with who has */
    bool is_idle = kvfs_io_queue_stalled(queue) == 0 && queue->running == 0;
    if (queue->ring != NULL)
        kvfs_uring_close(queue->ring);
    if (queue->threads != NULL && is_idle)
        kvfs_io_threads_close(queue->threads);
    if (is_idle && queue->buffers != MAP_FAILED)
        (void)munmap(queue->buffers, queue->buffers_bytes);
    free(queue->places);
    free(queue->free_places);
    free(queue);
}
