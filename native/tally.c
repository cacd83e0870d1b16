/* Counting records by device; see tally.h. */
#include "tally.h"

#include <string.h>

enum { RECORD_BYTES = 64, DEVICE_AT = 32, LENGTH_AT = 48 };

int64_t kvfs_tally(const uint8_t *records, size_t count, const uint8_t *lengths,
                   const uint8_t *statuses, uint64_t *counts, size_t devices)
{
    uint64_t sums[2 * KVFS_TALLY_DEVICES_MAX];
    int64_t counted = 0;
    memset(sums, 0, 2 * devices * sizeof sums[0]);
    for (size_t i = 0; i < count; i++) {
        const uint8_t *record = records + i * RECORD_BYTES;
        uint32_t length;
        uint16_t device;
        int32_t status = 0;
        memcpy(&length, record + LENGTH_AT, sizeof length);
        memcpy(&device, record + DEVICE_AT, sizeof device);
        if (statuses != NULL)
            memcpy(&status, statuses + i * sizeof status, sizeof status);
        if (length == 0 || status != 0)
            continue;
        if (device >= devices)
            return -1;
        uint64_t nbytes = length;
        if (lengths != NULL)
            memcpy(&nbytes, lengths + i * sizeof nbytes, sizeof nbytes);
        sums[2 * device]++;
        sums[2 * device + 1] += nbytes;
        counted++;
    }
    for (size_t i = 0; i < 2 * devices; i++)
        counts[i] += sums[i];
    return counted;
}
