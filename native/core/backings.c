#include "backings.h"

#include "protocol.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/ioctl.h>

int backings_create(struct backings *backings, int device)
{
    memset(backings, 0, sizeof *backings);
    backings->device = device;
    return -pthread_mutex_init(&backings->lock, NULL);
}

static struct backing **find_link(struct backings *backings, uint64_t nodeid)
{
    struct backing **link = &backings->buckets[nodeid % BACKING_BUCKETS];
    while (*link != NULL && (*link)->nodeid != nodeid)
        link = &(*link)->next;
    return link;
}

/* Register with the kernel; it keeps the file open, not the descriptor. */
static struct backing *open_backing(struct backings *backings, uint64_t nodeid, int fd,
                                    int *status)
{
    struct backing *backing = calloc(1, sizeof *backing);
    *status = -ENOMEM;
    if (backing == NULL)
        return NULL;
    struct backing_map map = {.fd = fd};
    int id = ioctl(backings->device, BACKING_OPEN, &map);
    if (id <= 0) {
        *status = id < 0 ? -errno : -EIO;
        free(backing);
        return NULL;
    }
    backing->nodeid = nodeid;
    backing->id = (uint32_t)id;
    return backing;
}

struct backing *backings_acquire(struct backings *backings, uint64_t nodeid, int fd, int *status)
{
    pthread_mutex_lock(&backings->lock);
    struct backing **link = find_link(backings, nodeid);
    if (*link == NULL)
        *link = open_backing(backings, nodeid, fd, status);
    struct backing *backing = *link;
    if (backing != NULL) {
        backing->users++;
        *status = 0;
    }
    pthread_mutex_unlock(&backings->lock);
    return backing;
}

void backings_release(struct backings *backings, struct backing *backing)
{
    pthread_mutex_lock(&backings->lock);
    if (--backing->users == 0) {
        *find_link(backings, backing->nodeid) = backing->next;
        (void)ioctl(backings->device, BACKING_CLOSE, &backing->id);
        free(backing);
    }
    pthread_mutex_unlock(&backings->lock);
}
