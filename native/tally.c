/* Counting records by device; see tally.h. */
#include "tally.h"

#include <string.h>

enum { RECORD_BYTES = 64, DEVICE_AT = 32, LENGTH_AT = 48 };

/* Sums of a run of records on one device: kept in registers, for adding to the same place in memory
 * again and again takes longer than reading the records. */
struct run {
    uint64_t device, count, bytes;
};

static void end_run(struct run *run, uint64_t *sums)
{
    sums[2 * run->device] += run->count;
    sums[2 * run->device + 1] += run->bytes;
    run->count = run->bytes = 0;
}

int64_t kvfs_tally(const uint8_t *records, size_t count, const uint8_t *lengths,
                   const uint8_t *statuses, uint64_t *counts, size_t devices)
{
    uint64_t sums[2 * KVFS_TALLY_DEVICES_MAX];
    struct run run = {0};
    int64_t counted = 0;
    memset(sums, 0, sizeof sums[0] * 2 * (devices > 0 ? devices : 1));
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
        if (device != run.device) {
            end_run(&run, sums);
            run.device = device;
        }
        uint64_t nbytes = length;
        if (lengths != NULL)
            memcpy(&nbytes, lengths + i * sizeof nbytes, sizeof nbytes);
        run.count++;
        run.bytes += nbytes;
        counted++;
    }
    end_run(&run, sums);
    for (size_t i = 0; i < 2 * devices; i++)
        counts[i] += sums[i];
    return counted;
}
