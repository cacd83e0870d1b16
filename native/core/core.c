#include "core.h"

#include <errno.h>
#include <signal.h>

#define MOVED_MAX (UINT64_C(1) << 40)
enum { BYTES_PER_MS = 64 << 10 };

void core_wake_main(struct core *core)
{
    (void)pthread_kill(core->main_thread, SIGUSR1);
}

enum { GRACE_MS = 1000 };

int64_t core_deadline_ns(const struct core *core, uint64_t nbytes, bool is_forwarded)
{
    uint64_t moved = nbytes < MOVED_MAX ? nbytes : MOVED_MAX;
    int64_t allowed_ms = (int64_t)core->options.deadline_ms + (int64_t)(moved / BYTES_PER_MS);
    /* The owner has a deadline of its own and should be the one to say so. */
    if (is_forwarded)
        allowed_ms += GRACE_MS;
    return now_ns() + allowed_ms * NS_PER_MS;
}

int core_start_thread(struct core *core, void *(*body)(void *), void *argument)
{
    pthread_attr_t attributes;
    pthread_t thread;
    (void)pthread_attr_init(&attributes);
    (void)pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    atomic_fetch_add(&core->thread_count, 1);
    int status = pthread_create(&thread, &attributes, body, argument);
    if (status != 0)
        atomic_fetch_sub(&core->thread_count, 1);
    (void)pthread_attr_destroy(&attributes);
    return -status;
}

void core_end_thread(struct core *core)
{
    atomic_fetch_sub(&core->thread_count, 1);
}
