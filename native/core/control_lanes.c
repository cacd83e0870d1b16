#include "control_lanes.h"

#include "read_lane.h"
#include "write_lane.h"

#include <errno.h>

/* Who waits for the answer has patience; others come again, and messages queue behind this one. */
enum { CLOSE_WAIT_MS = 1000, CLOSE_BRIEF_MS = 2, CLOSE_IS_BRIEF = 1 };
/* One block of READ_BLOCKS. */
enum {
    BLOCK_REF = 0,
    BLOCK_FLAGS = 4,
    BLOCK_OFFSET = 8,
    BLOCK_STORED = 16,
    BLOCK_DIGEST = 24,
    BLOCK_BYTES = 48,
};

int64_t read_begin(struct core *core, struct message *message, struct answer *answer)
{
    (void)answer;
    const uint8_t *payload = message->payload;
    int status;
    struct read_lane *lane =
        read_lane_create(load64(payload + 8), load64(payload + 16), load32(payload + 24),
                         load32(payload + 28), &status);
    if (lane == NULL)
        return status;
    lane->lane.nodeid = load64(payload);
    status = files_begin(&core->files, message->argument, &lane->lane);
    if (status != 0)
        lane->lane.destroy(&lane->lane);
    return status;
}

static int set_block(struct core *core, struct read_lane *lane, uint32_t index,
                     const uint8_t *bytes)
{
    struct segment *segment = NULL;
    uint64_t stored = load64(bytes + BLOCK_STORED);
    if (stored > 0) {
        segment = segments_find(&core->segments, load32(bytes + BLOCK_REF));
        if (segment == NULL)
            return -ENOENT;
    }
    int status = read_lane_set(lane, index, segment, load64(bytes + BLOCK_OFFSET), stored,
                               load32(bytes + BLOCK_FLAGS), bytes + BLOCK_DIGEST);
    if (status != 0 && segment != NULL)
        segment_release(segment);
    return status;
}

int64_t read_blocks(struct core *core, struct message *message, struct answer *answer)
{
    (void)answer;
    struct lane *lane = files_building(&core->files, message->argument);
    uint32_t first = load32(message->payload);
    uint32_t number = load32(message->payload + 4);
    if (lane == NULL || lane->kind != LANE_READ)
        return -ENOENT;
    if ((message->nbytes - 8) / BLOCK_BYTES < number || first > UINT32_MAX - number)
        return -EINVAL;
    for (uint32_t i = 0; i < number; i++) {
        int status = set_block(core, (struct read_lane *)lane, first + i,
                               message->payload + 8 + (size_t)i * BLOCK_BYTES);
        if (status != 0)
            return status;
    }
    return number;
}

int64_t read_end(struct core *core, struct message *message, struct answer *answer)
{
    (void)answer;
    struct lane *lane = files_building(&core->files, message->argument);
    if (lane == NULL || lane->kind != LANE_READ)
        return -ENOENT;
    if (!read_lane_is_complete((struct read_lane *)lane))
        return -EINVAL;
    files_serve(&core->files, message->argument);
    return 0;
}

int64_t write_begin(struct core *core, struct message *message, struct answer *answer)
{
    (void)answer;
    int status;
    const uint8_t *payload = message->payload;
    struct write_lane *lane =
        write_lane_create(message->fd, load64(payload + 8), load64(payload + 16),
                          load64(payload + 24), &status);
    if (lane == NULL)
        return status;
    lane->lane.nodeid = load64(payload);
    message->fd = -1; /* taken */
    status = files_begin(&core->files, message->argument, &lane->lane);
    if (status != 0)
        lane->lane.destroy(&lane->lane);
    else
        files_serve(&core->files, message->argument);
    return status;
}

/* The write lane of a handle, counted as used, or NULL. */
static struct write_lane *acquire_writer(struct core *core, uint64_t fh)
{
    struct lane *lane = files_acquire(&core->files, fh);
    if (lane != NULL && lane->kind != LANE_WRITE) {
        files_leave(&core->files, fh, lane);
        lane = NULL;
    }
    return lane == NULL ? NULL : write_lane_of(lane);
}

int64_t write_credit(struct core *core, struct message *message, struct answer *answer)
{
    (void)answer;
    uint64_t credit = load64(message->payload);
    if (credit > (uint64_t)INT64_MAX)
        return -EINVAL;
    struct write_lane *lane = acquire_writer(core, message->argument);
    if (lane == NULL)
        return -ENOENT;
    atomic_store(&lane->credit, credit);
    files_leave(&core->files, message->argument, &lane->lane);
    return 0;
}

/* What is said of a file that was written. */
enum {
    WRITTEN_HIGH_WATER = 0,
    WRITTEN_START = 8,
    WRITTEN_END = 16,
    WRITTEN_FLAGS = 24, /* 1: in order, 2: a write failed */
    WRITTEN_COUNT = 28, /* all digests; those from the one asked for on follow */
    WRITTEN_DIGESTS = 32,
    IN_ORDER = 1,
    HAS_FAILED = 2,
};

static void put_digests(struct write_lane *lane, uint32_t first, struct answer *answer)
{
    struct write_summary summary;
    uint8_t *payload = answer->payload;
    uint32_t room = (uint32_t)((answer->room - WRITTEN_DIGESTS) / KVFS_DIGEST_BYTES);
    uint32_t copied =
        write_lane_digests(lane, first, room, payload + WRITTEN_DIGESTS, &summary);
    store64(payload + WRITTEN_HIGH_WATER, summary.high_water);
    store64(payload + WRITTEN_START, summary.start);
    store64(payload + WRITTEN_END, summary.end);
    store32(payload + WRITTEN_FLAGS, (summary.is_sequential ? IN_ORDER : 0u) |
                                         (summary.has_failed ? HAS_FAILED : 0u));
    store32(payload + WRITTEN_COUNT, summary.count);
    answer->nbytes = WRITTEN_DIGESTS + (size_t)copied * KVFS_DIGEST_BYTES;
}

int64_t digests(struct core *core, struct message *message, struct answer *answer)
{
    struct write_lane *lane = acquire_writer(core, message->argument);
    if (lane == NULL)
        return -ENOENT;
    put_digests(lane, load32(message->payload), answer);
    files_leave(&core->files, message->argument, &lane->lane);
    return 0;
}

int64_t backing_begin(struct core *core, struct message *message, struct answer *answer)
{
    (void)answer;
    uint64_t nodeid = load64(message->payload);
    int status;
    if (message->fd < 0)
        return -EINVAL;
    if (!core->may_pass_through)
        return -EPERM;
    struct backing *backing = backings_acquire(&core->backings, nodeid, message->fd, &status);
    if (backing == NULL)
        return status;
    int64_t id = backing->id;
    status = files_set_backing(&core->files, message->argument, nodeid, backing);
    if (status != 0)
        backings_release(&core->backings, backing);
    return status != 0 ? status : id;
}

int64_t close_handle(struct core *core, struct message *message, struct answer *answer)
{
    struct lane *lane;
    bool is_brief = message->nbytes >= 8 && (load32(message->payload + 4) & CLOSE_IS_BRIEF);
    int64_t wait_ms = is_brief ? CLOSE_BRIEF_MS : CLOSE_WAIT_MS;
    int status = files_close(&core->files, message->argument, wait_ms, &lane);
    if (status != 0 || lane == NULL)
        return status;
    /* Those that do not fit were asked for before (DIGESTS): the payload says how many. */
    uint32_t first = message->nbytes >= 4 ? load32(message->payload) : 0;
    if (lane->kind == LANE_WRITE)
        put_digests(write_lane_of(lane), first, answer);
    lane->destroy(lane);
    return 0;
}
