#include "io_batch.h"

#include "batch.h"
#include "guard.h"
#include "hash.h"
#include "status.h"

#include <errno.h>
#include <stdlib.h>

/* What is copied and then hashed, while it is in the L2 cache; see fileio.c. */
enum { STEP = 1 << 18 };

/* An item under way. */
struct item {
    uint32_t running; /* pieces */
    int32_t status;   /* the first failure */
};

/* Where the bytes of a place belong. */
struct target {
    size_t item;
    uint8_t *data;        /* where to copy them to; NULL: they are there already */
    const uint8_t *bytes; /* where they were read to */
    uint32_t nbytes;
};

struct job {
    struct kvfs_io_queue *queue;
    const struct kvfs_io_manner *manner;
    struct item *items;
    struct target *targets; /* by place */
    size_t count;
    size_t next;   /* the item to begin next, or that is being begun */
    uint64_t done; /* bytes of it that were begun */
    size_t running;
};

static uint64_t least(uint64_t one, uint64_t other)
{
    return one < other ? one : other;
}

static bool open_job(struct job *job, size_t count)
{
    job->count = count;
    job->items = calloc(count + 1, sizeof *job->items);
    job->targets = calloc(KVFS_IO_DEPTH_MAX, sizeof *job->targets);
    return job->items != NULL && job->targets != NULL;
}

static void fail(struct item *item, int32_t status)
{
    if (item->status == KVFS_DONE)
        item->status = status;
}

static void next_item(struct job *job)
{
    job->next++;
    job->done = 0;
}

static void push(struct job *job, int place, const struct kvfs_io_op *op, uint32_t wanted)
{
    struct item *item = &job->items[job->targets[place].item];
    int status = kvfs_io_queue_push(job->queue, place, op, wanted, job->manner->align);
    if (status != 0) {
        kvfs_io_queue_give(job->queue, place);
        fail(item, status);
        return;
    }
    item->running++;
    job->running++;
}

/* Wait for one piece; false: the queue gave up, and so did the items that are not done. */
static bool wait_piece(struct job *job, int *place, int32_t *status)
{
    *place = kvfs_io_queue_wait(job->queue, job->manner->timeout_ms, status);
    if (*place >= 0) {
        job->running--;
        job->items[job->targets[*place].item].running--;
        return true;
    }
    int32_t reason = *place == -ETIME ? -ETIMEDOUT : *place;
    for (size_t i = 0; i < job->count; i++)
        if (i >= job->next || job->items[i].running > 0)
            fail(&job->items[i], reason);
    kvfs_io_queue_abandon(job->queue);
    return false;
}

static size_t close_job(struct job *job, void *statuses, size_t count, int32_t failure)
{
    size_t failed = 0;
    for (size_t i = 0; i < count; i++)
        failed += kvfs_put_status(statuses, i, failure != 0 ? failure : job->items[i].status);
    free(job->items);
    free(job->targets);
    return failed;
}

/* --- writing */

struct writing {
    struct job job;
    const struct kvfs_write_batch *batch;
    const struct kvfs_hash_ops *ops;
    struct kvfs_hash_state state;
    const uint8_t *source; /* a piece to be copied */
    uint8_t *buffer;
    size_t nbytes;
};

static void copy_piece(void *argument)
{
    struct writing *writing = argument;
    for (size_t done = 0; done < writing->nbytes; done += STEP) {
        size_t nbytes = least(writing->nbytes - done, STEP);
        memcpy(writing->buffer + done, writing->source + done, nbytes);
        writing->ops->update(&writing->state, writing->buffer + done, nbytes);
    }
}

static int32_t check_write(uint64_t offset, const uint8_t *source, uint64_t length,
                           uint64_t padding)
{
    uint64_t room = (uint64_t)INT64_MAX;
    if (offset > room || length > room - offset || padding > room - offset - length)
        return -EOVERFLOW;
    if (length > SIZE_MAX - (uintptr_t)source)
        return -EFAULT;
    return source == NULL && length > 0 ? KVFS_FAULT : KVFS_DONE;
}

/* Copy and begin the next piece; a failed item is passed by. */
static void begin_write(struct writing *writing, int place)
{
    struct job *job = &writing->job;
    const struct kvfs_write_batch *batch = writing->batch;
    struct item *item = &job->items[job->next];
    uint8_t *digest = (uint8_t *)batch->digests + job->next * KVFS_DIGEST_BYTES;
    uint64_t offset = kvfs_get64(batch->offsets, job->next);
    uint64_t length = kvfs_get64(batch->lengths, job->next);
    const uint8_t *source = (const uint8_t *)kvfs_get64(batch->sources, job->next);
    uint64_t padding = kvfs_padding(length, batch->pad_to);
    if (job->done == 0) {
        memset(digest, 0, KVFS_DIGEST_BYTES);
        item->status = check_write(offset, source, length, padding);
        writing->ops->reset(&writing->state);
    }
    writing->buffer = kvfs_io_queue_buffer(job->queue, place);
    writing->source = source + least(job->done, length);
    writing->nbytes = least(length - least(job->done, length), KVFS_IO_PIECE);
    bool is_readable = item->status == KVFS_DONE &&
                       (writing->nbytes == 0 || kvfs_guard_run(copy_piece, writing));
    if (!is_readable || length == 0) {
        fail(item, is_readable ? KVFS_DONE : KVFS_FAULT);
        if (is_readable)
            writing->ops->finish(&writing->state, digest);
        kvfs_io_queue_give(job->queue, place);
        next_item(job);
        return;
    }
    uint64_t zeroes = least(length + padding - job->done, KVFS_IO_PIECE) - writing->nbytes;
    memset(writing->buffer + writing->nbytes, 0, zeroes);
    uint32_t nbytes = (uint32_t)(writing->nbytes + zeroes);
    struct kvfs_io_op op = {.offset = offset + job->done, .data = writing->buffer,
                            .nbytes = nbytes, .fd = batch->fd, .flags = job->manner->flags,
                            .is_write = true};
    job->targets[place].item = job->next;
    push(job, place, &op, nbytes);
    job->done += nbytes;
    if (job->done < length + padding)
        return;
    writing->ops->finish(&writing->state, digest);
    next_item(job);
}

size_t kvfs_io_write_hash(struct kvfs_io_queue *queue, const struct kvfs_write_batch *batch,
                          const struct kvfs_io_manner *manner)
{
    struct writing writing = {
        .job = {.queue = queue, .manner = manner}, .batch = batch, .ops = kvfs_hash_ops()};
    struct job *job = &writing.job;
    if (!open_job(job, batch->count))
        return close_job(job, batch->statuses, batch->count, -ENOMEM);
    while (job->next < job->count || job->running > 0) {
        int place = job->next < job->count ? kvfs_io_queue_take(queue) : -1;
        int32_t status;
        if (place >= 0) {
            begin_write(&writing, place);
            continue;
        }
        if (job->running == 0 || !wait_piece(job, &place, &status))
            break;
        fail(&job->items[job->targets[place].item], status);
        kvfs_io_queue_give(queue, place);
    }
    for (size_t i = job->next; i < job->count; i++)
        fail(&job->items[i], -ETIMEDOUT); /* no place is left by what stalls */
    for (size_t i = 0; i < job->count; i++)
        if (job->items[i].status != KVFS_DONE)
            memset((uint8_t *)batch->digests + i * KVFS_DIGEST_BYTES, 0, KVFS_DIGEST_BYTES);
    return close_job(job, batch->statuses, batch->count, 0);
}

/* --- reading */

struct reading {
    struct job job;
    const struct kvfs_read_batch *batch;
    const struct kvfs_hash_ops *ops;
    const struct target *piece; /* to be copied */
    const uint8_t *data;        /* to be hashed */
    uint64_t length;
    uint8_t digest[KVFS_DIGEST_BYTES];
};

static void copy_out(void *argument)
{
    const struct reading *reading = argument;
    memcpy(reading->piece->data, reading->piece->bytes, reading->piece->nbytes);
}

static void hash_target(void *argument)
{
    struct reading *reading = argument;
    reading->ops->hash128(reading->data, reading->length, reading->digest);
}

/* Begin the next piece of the next item. */
static void begin_read(struct reading *reading, int place)
{
    struct job *job = &reading->job;
    const struct kvfs_read_batch *batch = reading->batch;
    uint32_t align = job->manner->align;
    uint64_t length = kvfs_get64(batch->lengths, job->next);
    uint64_t start = kvfs_get64(batch->offsets, job->next) + job->done;
    uint8_t *data = (uint8_t *)kvfs_get64(batch->targets, job->next) + job->done;
    uint64_t lead = start % align;
    uint64_t nbytes = length - job->done;
    bool is_straight = job->manner->timeout_ms < 0 && lead == 0 && nbytes >= align &&
                       (uintptr_t)data % job->manner->address_align == 0;
    if (is_straight)
        nbytes = least(nbytes - nbytes % align, KVFS_IO_STRAIGHT);
    else
        nbytes = least(nbytes, KVFS_IO_PIECE - lead);
    uint8_t *buffer = is_straight ? data : kvfs_io_queue_buffer(job->queue, place);
    struct kvfs_io_op op = {.offset = start - lead, .data = buffer,
                            .fd = kvfs_get32(batch->fds, job->next),
                            .flags = job->manner->flags};
    op.nbytes = (uint32_t)(lead + nbytes + kvfs_padding(lead + nbytes, align));
    job->targets[place] = (struct target){job->next, is_straight ? NULL : data, buffer + lead,
                                          (uint32_t)nbytes};
    push(job, place, &op, (uint32_t)(lead + nbytes));
    job->done += nbytes;
    if (job->done == length || job->items[job->next].status != KVFS_DONE)
        next_item(job);
}

/* Look at an item whose last piece has come. */
static void verify(struct reading *reading, size_t index)
{
    struct item *item = &reading->job.items[index];
    bool is_begun = index < reading->job.next;
    if (!is_begun || item->running > 0 || item->status != KVFS_DONE ||
        reading->batch->digests == NULL)
        return;
    const char *wanted = (const char *)reading->batch->digests + index * KVFS_DIGEST_BYTES;
    reading->data = (const uint8_t *)kvfs_get64(reading->batch->targets, index);
    reading->length = kvfs_get64(reading->batch->lengths, index);
    if (!kvfs_guard_run(hash_target, reading))
        item->status = KVFS_FAULT;
    else if (memcmp(reading->digest, wanted, KVFS_DIGEST_BYTES) != 0)
        item->status = KVFS_MISMATCH;
}

static void end_read(struct reading *reading, int place, int32_t status)
{
    struct target *target = &reading->job.targets[place];
    struct item *item = &reading->job.items[target->item];
    reading->piece = target;
    if (status == KVFS_DONE && target->data != NULL && !kvfs_guard_run(copy_out, reading))
        status = KVFS_FAULT;
    fail(item, status);
    kvfs_io_queue_give(reading->job.queue, place);
    verify(reading, target->item);
}

/* Pass by items that need no transfer. */
static void skip_empty(struct reading *reading)
{
    struct job *job = &reading->job;
    const struct kvfs_read_batch *batch = reading->batch;
    while (job->next < job->count && job->done == 0) {
        uint64_t offset = kvfs_get64(batch->offsets, job->next);
        uint64_t length = kvfs_get64(batch->lengths, job->next);
        uint64_t room = (uint64_t)INT64_MAX;
        int32_t status = KVFS_DONE;
        if (offset > room || length > room - offset)
            status = -EOVERFLOW;
        else if (length > SIZE_MAX - kvfs_get64(batch->targets, job->next))
            status = -EFAULT;
        else if (length > 0)
            return;
        fail(&job->items[job->next], status);
        job->next++;
        verify(reading, job->next - 1);
    }
}

size_t kvfs_io_read_verify(struct kvfs_io_queue *queue, const struct kvfs_read_batch *batch,
                           const struct kvfs_io_manner *manner)
{
    struct reading reading = {
        .job = {.queue = queue, .manner = manner}, .batch = batch, .ops = kvfs_hash_ops()};
    struct job *job = &reading.job;
    if (!open_job(job, batch->count))
        return close_job(job, batch->statuses, batch->count, -ENOMEM);
    for (;;) {
        skip_empty(&reading);
        if (job->next == job->count && job->running == 0)
            break;
        int place = job->next < job->count ? kvfs_io_queue_take(queue) : -1;
        int32_t status;
        if (place >= 0) {
            begin_read(&reading, place);
            continue;
        }
        if (job->running == 0 || !wait_piece(job, &place, &status))
            break;
        end_read(&reading, place, status);
    }
    for (size_t i = job->next; i < job->count; i++)
        fail(&job->items[i], -ETIMEDOUT); /* no place is left by what stalls */
    return close_job(job, batch->statuses, batch->count, 0);
}
