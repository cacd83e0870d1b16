#include "threads.h"

#include "control.h"
#include "device.h"
#include "interrupts.h"
#include "reader.h"
#include "replies.h"
#include "sockets.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

enum { WATCHDOG_MS = 50, BATCH = 64 };

static void *run_sender(void *argument)
{
    struct core *core = argument;
    link_run_sender(&core->link);
    core_end_thread(core);
    return NULL;
}

static void *run_notifier(void *argument)
{
    struct core *core = argument;
    notify_run(&core->notify, core->device);
    core_end_thread(core);
    return NULL;
}

/* Take messages of one owner until it goes, or the core ends. */
static void pump(struct core *core, uint8_t *message, size_t room)
{
    while (!atomic_load(&core->is_ending)) {
        int passed = -1;
        int64_t nbytes = sockets_receive(core->link.requests, message, room, &passed);
        if (passed >= 0)
            (void)close(passed);
        if (nbytes > 0)
            replies_handle(core, message, (size_t)nbytes);
        else if (nbytes != -EMSGSIZE && nbytes != -EINTR)
            return;
    }
}

static void *run_pump(void *argument)
{
    struct core *core = argument;
    size_t room = replies_room(core);
    uint8_t *message = malloc(room);
    unsigned generation = 0;
    if (message == NULL)
        log_line("out of memory: %zu bytes for replies", room);
    atomic_store(&core->pump_thread_id, (int)gettid());
    while (message != NULL && link_wait_owner(&core->link, &generation)) {
        pump(core, message, room);
        link_lost(&core->link, generation);
    }
    atomic_store(&core->pump_thread_id, 0);
    free(message);
    core_end_thread(core);
    return NULL;
}

static void *run_control(void *argument)
{
    struct core *core = argument;
    unsigned generation = 0;
    while (link_wait_owner(&core->link, &generation)) {
        control_serve(core);
        link_lost(&core->link, generation);
    }
    core_end_thread(core);
    return NULL;
}

void threads_fail_pending(struct core *core, bool is_all, int error)
{
    struct pending_request requests[BATCH];
    size_t n;
    while ((n = pending_drain(&core->pending, is_all, requests, BATCH)) > 0)
        for (size_t i = 0; i < n; i++)
            if (requests[i].device >= 0)
                (void)device_reply_error(requests[i].device, requests[i].unique, error);
}

void threads_check_deadlines(struct core *core)
{
    static struct log_limit limit;
    struct pending_request requests[BATCH];
    size_t n;
    int64_t now = now_ns();
    int64_t allowed = atomic_load(&core->allowed_ns);
    while ((n = pending_overdue(&core->pending, now - allowed, requests, BATCH)) > 0) {
        count(&core->counters.deadline_hits, n);
        for (size_t i = 0; i < n; i++) {
            (void)device_reply_error(requests[i].device, requests[i].unique, EIO);
            log_limited(&limit, "deadline: request type %u of inode %llu, EIO",
                        requests[i].opcode, (unsigned long long)requests[i].nodeid);
        }
    }
    unsigned stuck = reader_answer_overdue(core, now);
    if (stuck > 0)
        log_limited(&limit, "deadline: %u of %u reader threads wait for a device, EIO", stuck,
                    atomic_load(&core->reader_count));
    while (stuck-- > 0 && reader_start(core) == 0)
        ;
}

static void *run_watchdog(void *argument)
{
    struct core *core = argument;
    while (!atomic_load(&core->is_ending)) {
        sleep_ms(WATCHDOG_MS);
        threads_check_deadlines(core);
        interrupts_check(core);
    }
    core_end_thread(core);
    return NULL;
}

int threads_start(struct core *core)
{
    void *(*const bodies[])(void *) = {run_sender, run_notifier, run_pump, run_control,
                                       run_watchdog};
    for (size_t i = 0; i < sizeof bodies / sizeof *bodies; i++) {
        int status = core_start_thread(core, bodies[i], core);
        if (status != 0)
            return status;
    }
    return 0;
}
