#include "interrupts.h"

#include "device.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum { PATIENCE_MS = 1000, CHECKED_MAX = 256, STATUS_BYTES = 4096 };

/* Whether a thread has SIGKILL pending, as every fatal signal leaves it; or is gone. */
static bool is_dying(uint32_t pid)
{
    char path[32];
    char text[STATUS_BYTES];
    if (pid == 0)
        return false;
    (void)snprintf(path, sizeof path, "/proc/%u/status", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return errno == ENOENT;
    ssize_t nbytes = read(fd, text, sizeof text - 1);
    (void)close(fd);
    if (nbytes <= 0)
        return errno == ESRCH;
    text[nbytes] = '\0';
    const char *line = strstr(text, "\nSigPnd:");
    if (line == NULL)
        return false;
    uint64_t signals = strtoull(line + strlen("\nSigPnd:"), NULL, 16);
    return (signals >> (SIGKILL - 1)) & 1;
}

void interrupts_receive(struct core *core, const struct request *request)
{
    struct fuse_interrupt_in interrupt;
    if (!BODY_GET(request, &interrupt) || interrupt.unique == 0)
        return;
    uint32_t pid;
    if (reader_find_job(core, interrupt.unique, &pid)) {
        /* It ends soon by itself, at the latest by its deadline. */
        if (is_dying(pid) && reader_answer_job(core, interrupt.unique, EINTR))
            count(&core->counters.interrupts, 1);
        return;
    }
    pending_interrupt(&core->pending, interrupt.unique, now_ns());
    interrupts_check(core);
}

void interrupts_check(struct core *core)
{
    struct pending_request found[CHECKED_MAX];
    struct pending_request taken;
    size_t n = pending_interrupted(&core->pending, found, CHECKED_MAX);
    int64_t now = now_ns();
    for (size_t i = 0; i < n; i++) {
        bool is_due = now - found[i].interrupted_ns >= PATIENCE_MS * NS_PER_MS;
        if ((is_due || is_dying(found[i].pid)) &&
            pending_answer(&core->pending, found[i].unique, &taken)) {
            count(&core->counters.interrupts, 1);
            (void)device_reply_error(taken.device, taken.unique, EINTR);
        }
    }
}
