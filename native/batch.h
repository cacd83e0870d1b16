/* Reading and writing the arrays of a batch: any alignment, little-endian.
 *
 * An array of the batch is an address of packed values; items are indexed from 0. */
#ifndef KVFS_BATCH_H
#define KVFS_BATCH_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

static inline uint64_t kvfs_get64(const void *array, size_t index)
{
    uint64_t value;
    memcpy(&value, (const char *)array + index * sizeof value, sizeof value);
    return value;
}

static inline int32_t kvfs_get32(const void *array, size_t index)
{
    int32_t value;
    memcpy(&value, (const char *)array + index * sizeof value, sizeof value);
    return value;
}

/* Store a status; returns 1 if it is not 0, to be summed. */
static inline size_t kvfs_put_status(void *statuses, size_t index, int32_t status)
{
    memcpy((char *)statuses + index * sizeof status, &status, sizeof status);
    return status != 0;
}

/* Bytes from the end of an item to the next multiple of unit. REQUIRES: unit > 0. */
static inline uint64_t kvfs_padding(uint64_t length, uint64_t unit)
{
    uint64_t past = length % unit;
    return past == 0 ? 0 : unit - past;
}

#endif
