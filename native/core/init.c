#include "init.h"

#include "device.h"
#include "requests.h"

#include <errno.h>
#include <time.h>

enum { BACKGROUND_MAX = 64, BACKGROUND_CONGESTED = 48, SPLIT = 32 };
#define PASSTHROUGH ((uint64_t)INIT2_PASSTHROUGH << SPLIT)
/* It keeps dirty pages in the kernel, and silently turns passthrough off. */
/* The owner is told of FALLOCATE by the short form of SETXATTR. */
#define NEVER ((uint64_t)FUSE_WRITEBACK_CACHE | FUSE_SETXATTR_EXT)
#define WANTED ((uint64_t)FUSE_ASYNC_READ | FUSE_PARALLEL_DIROPS | FUSE_MAX_PAGES | FUSE_INIT_EXT)

int init_create(struct init *init)
{
    memset(init, 0, sizeof *init);
    int status = pthread_mutex_init(&init->lock, NULL);
    pthread_condattr_t attributes;
    (void)pthread_condattr_init(&attributes);
    (void)pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    if (status == 0)
        status = pthread_cond_init(&init->wake, &attributes);
    (void)pthread_condattr_destroy(&attributes);
    return -status;
}

void init_destroy(struct init *init)
{
    (void)pthread_cond_destroy(&init->wake);
    (void)pthread_mutex_destroy(&init->lock);
}

bool init_receive(struct core *core, struct reader *reader, const struct request *request)
{
    struct init *init = &core->init;
    const size_t before_flags2 = offsetof(struct fuse_init_in, flags2);
    struct fuse_init_in in = {.major = 0};
    if (request->body_bytes < before_flags2 || request->nbytes > INIT_BYTES_MAX) {
        (void)device_reply_error(reader->device, request->header.unique, EIO);
        return true;
    }
    size_t known = request->body_bytes < sizeof in ? request->body_bytes : sizeof in;
    memcpy(&in, request->body, known);
    uint64_t flags = in.flags;
    if (flags & FUSE_INIT_EXT)
        flags |= (uint64_t)in.flags2 << SPLIT;
    uint8_t kept[INIT_BYTES_MAX];
    memcpy(kept, request->bytes, request->nbytes);
    store32(kept + IN_HEADER + offsetof(struct fuse_init_in, flags),
            (uint32_t)(in.flags & ~NEVER));
    pthread_mutex_lock(&init->lock);
    memcpy(init->bytes, kept, request->nbytes);
    init->nbytes = request->nbytes;
    init->offered = flags;
    pthread_cond_broadcast(&init->wake);
    pthread_mutex_unlock(&init->lock);
    struct request shown = *request;
    shown.bytes = kept;
    shown.body = kept + IN_HEADER;
    requests_forward(core, reader, &shown);
    return true;
}

bool init_wait(struct init *init, int64_t wait_ms)
{
    int64_t end = now_ns() + wait_ms * NS_PER_MS;
    struct timespec until = {.tv_sec = end / NS_PER_S, .tv_nsec = end % NS_PER_S};
    int status = 0;
    pthread_mutex_lock(&init->lock);
    while (init->nbytes == 0 && status == 0)
        status = pthread_cond_timedwait(&init->wake, &init->lock, &until);
    bool is_there = init->nbytes > 0;
    pthread_mutex_unlock(&init->lock);
    return is_there;
}

size_t init_copy(struct core *core, uint8_t *target, size_t room)
{
    struct init *init = &core->init;
    pthread_mutex_lock(&init->lock);
    size_t nbytes = init->nbytes <= room ? init->nbytes : 0;
    memcpy(target, init->bytes, nbytes);
    pthread_mutex_unlock(&init->lock);
    if (nbytes >= IN_HEADER)
        store64(target + offsetof(struct fuse_in_header, unique),
                UNIQUE_OWN | (2 * atomic_fetch_add(&core->own_unique, 1)));
    return nbytes;
}

size_t init_patch(struct core *core, uint8_t *message, size_t nbytes)
{
    struct fuse_init_out out = {.major = 0};
    if (nbytes < OUT_HEADER + offsetof(struct fuse_init_out, time_gran))
        return nbytes;
    size_t given = nbytes - OUT_HEADER;
    memcpy(&out, message + OUT_HEADER, given < sizeof out ? given : sizeof out);
    pthread_mutex_lock(&core->init.lock);
    uint64_t offered = core->init.offered;
    pthread_mutex_unlock(&core->init.lock);
    uint64_t flags = out.flags;
    if (out.flags & FUSE_INIT_EXT)
        flags |= (uint64_t)out.flags2 << SPLIT;
    flags |= WANTED;
    if (core->may_pass_through)
        flags |= PASSTHROUGH;
    flags &= offered & ~NEVER;
    out.flags = (uint32_t)flags;
    out.flags2 = (uint32_t)(flags >> SPLIT);
    out.max_pages = (uint16_t)core->max_pages;
    out.max_write = core->max_write;
    if (out.max_background == 0) {
        out.max_background = BACKGROUND_MAX;
        out.congestion_threshold = BACKGROUND_CONGESTED;
    }
    struct fuse_out_header header;
    memcpy(&header, message, sizeof header);
    header.len = OUT_HEADER + sizeof out;
    memcpy(message, &header, sizeof header);
    memcpy(message + OUT_HEADER, &out, sizeof out);
    store32(message + OUT_HEADER + INIT_STACK_DEPTH_OFFSET, flags & PASSTHROUGH ? 1 : 0);
    return header.len;
}
