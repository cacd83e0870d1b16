/* Backing ids of passthrough files: one per inode, shared by its handles.
 *
 * Thread-safety: any thread. */
#ifndef CORE_BACKINGS_H
#define CORE_BACKINGS_H

#include <pthread.h>
#include <stdint.h>

enum { BACKING_BUCKETS = 1024 };

struct backing {
    struct backing *next;
    uint64_t nodeid;
    uint32_t id;
    unsigned users;
};

struct backings {
    pthread_mutex_t lock;
    int device;
    struct backing *buckets[BACKING_BUCKETS];
};

int backings_create(struct backings *backings, int device);

/* The backing of an inode, registered from `fd` if it has none yet; NULL with *status -errno. */
struct backing *backings_acquire(struct backings *backings, uint64_t nodeid, int fd, int *status);

void backings_release(struct backings *backings, struct backing *backing);

#endif
