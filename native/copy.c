#include "copy.h"

#include "batch.h"
#include "guard.h"
#include "hash.h"
#include "status.h"

#include <errno.h>
#include <stdbool.h>
#include <string.h>

/* Batches of at least this many bytes bypass the caches on their way to the reader: they would
 * evict more than they leave behind, and ordinary stores first read what they overwrite. */
enum { STREAM_BYTES_MIN = 1 << 20 };

/* What one guarded body works on. */
struct item {
    const struct kvfs_hash_ops *ops;
    uint8_t *target;
    const uint8_t *source;
    size_t length;
    size_t padding;
    uint8_t digest[KVFS_DIGEST_BYTES];
    bool is_hashed;
    bool is_streamed;
};

static void copy_hash_item(void *argument)
{
    struct item *item = argument;
    item->ops->copy_hash(item->target, item->source, item->length, item->digest);
    if (item->padding > 0)
        item->ops->zero(item->target + item->length, item->padding);
}

static void copy_item(void *argument)
{
    struct item *item = argument;
    if (!item->is_hashed && item->is_streamed)
        item->ops->copy(item->target, item->source, item->length);
    else if (!item->is_hashed)
        memcpy(item->target, item->source, item->length);
    else if (item->is_streamed)
        item->ops->copy_hash(item->target, item->source, item->length, item->digest);
    else
        item->ops->copy_hash_cached(item->target, item->source, item->length, item->digest);
}

static void hash_item(void *argument)
{
    struct item *item = argument;
    item->ops->hash128(item->source, item->length, item->digest);
}

/* Whether [start, start + nbytes + padding) is a range of addresses at all. */
static bool is_range(const void *start, size_t nbytes, size_t padding)
{
    size_t room = SIZE_MAX - (uintptr_t)start;
    return nbytes <= room && padding <= room - nbytes;
}

static int32_t compare(const struct item *item, const void *digests, size_t index)
{
    const char *wanted = (const char *)digests + index * KVFS_DIGEST_BYTES;
    bool is_equal = memcmp(item->digest, wanted, KVFS_DIGEST_BYTES) == 0;
    return is_equal ? KVFS_DONE : KVFS_MISMATCH;
}

size_t kvfs_copy_hash(const struct kvfs_copy_batch *batch, uint64_t pad_to)
{
    size_t failed = 0;
    struct item item = {.ops = kvfs_hash_ops()};
    for (size_t i = 0; i < batch->count; i++) {
        item.target = (uint8_t *)kvfs_get64(batch->targets, i);
        item.source = (const uint8_t *)kvfs_get64(batch->sources, i);
        item.length = kvfs_get64(batch->lengths, i);
        item.padding = kvfs_padding(item.length, pad_to);
        memset(item.digest, 0, sizeof item.digest);
        int32_t status = KVFS_DONE;
        if (!is_range(item.source, item.length, 0) ||
            !is_range(item.target, item.length, item.padding))
            status = -EFAULT;
        else if (!kvfs_guard_run(copy_hash_item, &item))
            status = KVFS_FAULT;
        memcpy((char *)batch->digests + i * KVFS_DIGEST_BYTES, item.digest, KVFS_DIGEST_BYTES);
        failed += kvfs_put_status(batch->statuses, i, status);
    }
    kvfs_store_fence();
    return failed;
}

static bool is_large(const struct kvfs_copy_batch *batch)
{
    uint64_t total = 0;
    for (size_t i = 0; i < batch->count && total < STREAM_BYTES_MIN; i++) {
        uint64_t length = kvfs_get64(batch->lengths, i);
        total = length < STREAM_BYTES_MIN ? total + length : STREAM_BYTES_MIN;
    }
    return total >= STREAM_BYTES_MIN;
}

size_t kvfs_copy_verify(const struct kvfs_copy_batch *batch)
{
    size_t failed = 0;
    struct item item = {.ops = kvfs_hash_ops(),
                        .is_hashed = batch->digests != NULL,
                        .is_streamed = is_large(batch)};
    for (size_t i = 0; i < batch->count; i++) {
        item.target = (uint8_t *)kvfs_get64(batch->targets, i);
        item.source = (const uint8_t *)kvfs_get64(batch->sources, i);
        item.length = kvfs_get64(batch->lengths, i);
        int32_t status = KVFS_DONE;
        if (!is_range(item.source, item.length, 0) || !is_range(item.target, item.length, 0))
            status = -EFAULT;
        else if (!kvfs_guard_run(copy_item, &item))
            status = KVFS_FAULT;
        else if (item.is_hashed)
            status = compare(&item, batch->digests, i);
        failed += kvfs_put_status(batch->statuses, i, status);
    }
    kvfs_store_fence();
    return failed;
}

size_t kvfs_verify(const struct kvfs_copy_batch *batch)
{
    size_t failed = 0;
    struct item item = {.ops = kvfs_hash_ops()};
    for (size_t i = 0; i < batch->count; i++) {
        item.source = (const uint8_t *)kvfs_get64(batch->sources, i);
        item.length = kvfs_get64(batch->lengths, i);
        int32_t status = KVFS_DONE;
        if (!is_range(item.source, item.length, 0))
            status = -EFAULT;
        else if (!kvfs_guard_run(hash_item, &item))
            status = KVFS_FAULT;
        else
            status = compare(&item, batch->digests, i);
        failed += kvfs_put_status(batch->statuses, i, status);
    }
    return failed;
}
