/* A lane: how the core itself serves a file handle.
 *
 * Whoever uses a lane counts itself in `users` (files_acquire, files_leave); a closed lane takes no
 * further users, so that closing waits for those that are there. */
#ifndef CORE_LANE_H
#define CORE_LANE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

enum lane_kind { LANE_NONE = 0, LANE_READ = 1, LANE_WRITE = 2, LANE_BACKING = 3 };

struct lane {
    enum lane_kind kind;
    uint32_t generation; /* of the owner that installed it */
    uint64_t nodeid;
    atomic_uint users;
    bool is_served; /* these two under the lock of the file table */
    bool is_closed;
    atomic_bool is_broken; /* written by an owner that died: EIO until it is released */
    void (*destroy)(struct lane *lane);
};

#endif
