/* A file that is read from segments: its table of blocks. */
#ifndef CORE_READ_LANE_H
#define CORE_READ_LANE_H

#include "lane.h"
#include "segments.h"

enum { BLOCK_VERIFIED = 1, BLOCK_FILLED = 2, DIGEST = 16 };
/* READ_SHORT: nothing of the file is cached, reads past its end may be answered by what is there.
 * Else the kernel, which asks for cached pages, believes in a longer file than this table. */
enum { READ_VERIFY = 1, READ_SHORT = 2 };
/* Above the flags: a deadline of its own in milliseconds, 0 for the mount's. */
enum { READ_DEADLINE_SHIFT = 8 };
/* The tables of all files together, in blocks: 48 bytes each. */
enum { READ_BLOCKS_MAX = 1 << 24 };

struct block {
    struct segment *segment; /* NULL: the block is all zeroes */
    uint64_t offset;
    uint64_t stored;
    uint8_t digest[DIGEST];
    atomic_uint flags;
};

struct read_lane {
    struct lane lane;
    uint64_t size;
    uint64_t stride;
    uint32_t count;
    uint32_t filled;
    uint32_t flags;
    uint32_t deadline_ms;
    struct block *blocks;
};

/* An empty table, or NULL with *status -EINVAL or -ENOMEM. */
struct read_lane *read_lane_create(uint64_t size, uint64_t stride, uint32_t count, uint32_t flags,
                                   int *status);

/* Fill in one block; the reference of `segment` (NULL if stored is 0) is taken if it returns 0. */
int read_lane_set(struct read_lane *lane, uint32_t index, struct segment *segment,
                  uint64_t offset, uint64_t stored, uint32_t flags, const uint8_t *digest);

/* Whether the table is whole. */
bool read_lane_is_complete(const struct read_lane *lane);

#endif
