#include "control.h"

#include "control_lanes.h"
#include "init.h"
#include "sockets.h"

#include <assert.h>
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/sysmacros.h>
#include <unistd.h>

enum { ANSWER_BIT = 1 << 31, FLAG_PASSTHROUGH = 1, INIT_WAIT_MS = 1000, SEND_WAIT_MS = 1000 };
#define ALLOWED_MS_MAX UINT64_C(86400000)

static int64_t hello(struct core *core, struct message *message, struct answer *answer)
{
    if (message->argument != CONTROL_VERSION)
        return -EPROTO;
    bool is_offered = init_wait(&core->init, INIT_WAIT_MS) &&
                      (core->init.offered >> 32) & INIT2_PASSTHROUGH;
    store32(answer->payload, CONTROL_VERSION);
    store32(answer->payload + 4, core->may_pass_through && is_offered ? FLAG_PASSTHROUGH : 0);
    store32(answer->payload + 8, core->max_write);
    store32(answer->payload + 12, core->mount.device_minor);
    store64(answer->payload + 16,
            makedev(core->mount.device_major, core->mount.device_minor));
    answer->nbytes = 24;
    return 0;
}

static int64_t segment(struct core *core, struct message *message, struct answer *answer)
{
    (void)answer;
    if (message->argument > UINT32_MAX)
        return -EINVAL;
    int status = segments_add(&core->segments, (uint32_t)message->argument, message->fd,
                              load64(message->payload), load64(message->payload + 8));
    if (status == 0)
        message->fd = -1; /* taken */
    return status;
}

static int64_t drop_segment(struct core *core, struct message *message, struct answer *answer)
{
    (void)answer;
    if (message->argument > UINT32_MAX)
        return -EINVAL;
    return segments_drop(&core->segments, (uint32_t)message->argument);
}

static int64_t names(struct core *core, struct message *message, struct answer *answer)
{
    (void)answer;
    return filter_install(&core->filter, message->fd, load64(message->payload),
                          message->argument);
}

static int64_t status(struct core *core, struct message *message, struct answer *answer)
{
    (void)message;
    const struct counters *counters = &core->counters;
    const uint64_t values[] = {
        atomic_load(&counters->requests_native_read),
        atomic_load(&counters->bytes_native_read),
        atomic_load(&counters->requests_native_write),
        atomic_load(&counters->bytes_native_write),
        atomic_load(&counters->lookups_answered),
        atomic_load(&counters->forwarded),
        atomic_load(&counters->deadline_hits),
        atomic_load(&counters->interrupts),
        atomic_load(&counters->verify_failures),
        atomic_load(&counters->faults),
        atomic_load(&counters->respawns),
        atomic_load(&core->pending.waiting),
        files_open_count(&core->files),
        atomic_load(&core->reader_count),
        page_cache_bytes(&core->page_cache),
    };
    memcpy(answer->payload, values, sizeof values);
    answer->nbytes = sizeof values;
    return 0;
}

static int64_t stop(struct core *core, struct message *message, struct answer *answer)
{
    (void)message;
    (void)answer;
    atomic_store(&core->is_stop_asked, true);
    return 0;
}

static int64_t allow(struct core *core, struct message *message, struct answer *answer)
{
    (void)answer;
    if (message->argument > ALLOWED_MS_MAX)
        return -EINVAL;
    atomic_store(&core->allowed_ns, (int64_t)message->argument * NS_PER_MS);
    return 0;
}

static int64_t hold(struct core *core, struct message *message, struct answer *answer)
{
    int64_t status = allow(core, message, answer);
    if (status != 0)
        return status;
    atomic_store(&core->is_given, message->argument > 0);
    link_hold(&core->link, message->argument > 0);
    return 0;
}

static int64_t handles(struct core *core, struct message *message, struct answer *answer)
{
    static_assert(sizeof(struct handle) == 24, "as it is sent");
    enum { ROOM = (CONTROL_BYTES_MAX - CONTROL_HEADER) / sizeof(struct handle) };
    struct handle *found = calloc(ROOM, sizeof *found);
    if (found == NULL)
        return -ENOMEM;
    int64_t number = files_handles(&core->files, message->argument, found, ROOM);
    if (number > 0) {
        answer->nbytes = (size_t)number * sizeof *found;
        memcpy(answer->payload, found, answer->nbytes);
    }
    free(found);
    return number;
}

static const struct {
    int64_t (*handle)(struct core *core, struct message *message, struct answer *answer);
    size_t payload_min;
} kinds[] = {
    [1] = {hello, 0},       [2] = {segment, 16},     [3] = {drop_segment, 0},
    [4] = {read_begin, 32}, [5] = {read_blocks, 8},  [6] = {read_end, 0},
    [7] = {write_begin, 32}, [8] = {write_credit, 8}, [9] = {backing_begin, 8},
    [10] = {close_handle, 0}, [11] = {names, 8},     [12] = {status, 0},
    [13] = {stop, 0},       [14] = {handles, 0},     [15] = {allow, 0},
    [16] = {digests, 4},    [17] = {hold, 0},
};

size_t control_handle(struct core *core, const uint8_t *bytes, size_t nbytes, int fd,
                      uint8_t *reply)
{
    struct message message = {.fd = fd};
    struct answer answer = {.payload = reply + CONTROL_HEADER,
                            .room = CONTROL_BYTES_MAX - CONTROL_HEADER};
    uint32_t type = 0, sequence = 0;
    int64_t result = -EINVAL;
    if (nbytes >= CONTROL_HEADER) {
        type = load32(bytes);
        sequence = load32(bytes + 4);
        message.argument = load64(bytes + 8);
        message.payload = bytes + CONTROL_HEADER;
        message.nbytes = nbytes - CONTROL_HEADER;
        if (type == 0 || type >= sizeof kinds / sizeof *kinds)
            result = -ENOSYS;
        else if (message.nbytes >= kinds[type].payload_min)
            result = kinds[type].handle(core, &message, &answer);
    }
    if (message.fd >= 0)
        (void)close(message.fd);
    store32(reply, type | (uint32_t)ANSWER_BIT);
    store32(reply + 4, sequence);
    store64(reply + 8, (uint64_t)result);
    return CONTROL_HEADER + (result < 0 ? 0 : answer.nbytes);
}

/* Send an answer; an owner that reads none for a while is lost. */
static bool send_answer(int fd, const uint8_t *answer, size_t nbytes)
{
    int result = sockets_send_nowait(fd, answer, nbytes);
    if (result == -EAGAIN) {
        struct pollfd poller = {.fd = fd, .events = POLLOUT};
        (void)poll(&poller, 1, SEND_WAIT_MS);
        result = sockets_send_nowait(fd, answer, nbytes);
    }
    return result == 0;
}

void control_serve(struct core *core)
{
    int fd = core->link.control;
    uint8_t *buffers = malloc(2 * CONTROL_BYTES_MAX);
    if (buffers == NULL) {
        log_line("out of memory: control messages");
        return;
    }
    for (;;) {
        int passed = -1;
        int64_t nbytes = sockets_receive(fd, buffers, CONTROL_BYTES_MAX, &passed);
        if (nbytes == -EINTR)
            continue;
        if (nbytes <= 0 && nbytes != -EMSGSIZE)
            break;
        size_t given = nbytes > 0 ? (size_t)nbytes : 0;
        size_t size =
            control_handle(core, buffers, given, passed, buffers + CONTROL_BYTES_MAX);
        if (!send_answer(fd, buffers + CONTROL_BYTES_MAX, size))
            break;
        if (atomic_load(&core->is_stop_asked))
            core_wake_main(core);
    }
    free(buffers);
}
