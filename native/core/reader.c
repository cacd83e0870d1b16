#include "reader.h"

#include "device.h"
#include "requests.h"

#include <errno.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The kernel refuses reads into less than 8 KiB. */
static size_t request_room(const struct core *core)
{
    size_t room = core->max_write + (size_t)WRITE_HEADER;
    return room < 2 * PAGE ? 2 * PAGE : room;
}

static uint8_t *map_buffer(size_t nbytes)
{
    void *map = mmap(NULL, nbytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return map == MAP_FAILED ? NULL : map;
}

int reader_prepare(struct reader *reader, struct core *core, int device)
{
    reader->core = core;
    reader->device = device;
    atomic_init(&reader->job, 0);
    atomic_init(&reader->is_stuck, false);
    uint8_t *request = map_buffer(request_room(core) + PAGE);
    reader->buffer = map_buffer(core->payload_max);
    if (request == NULL || reader->buffer == NULL) {
        if (request != NULL)
            (void)munmap(request, request_room(core) + PAGE);
        if (reader->buffer != NULL)
            (void)munmap(reader->buffer, core->payload_max);
        return -ENOMEM;
    }
    reader->request = request + PAGE - WRITE_HEADER;
    return 0;
}

void reader_dispose(struct reader *reader)
{
    (void)munmap(reader->request + WRITE_HEADER - PAGE, request_room(reader->core) + PAGE);
    (void)munmap(reader->buffer, reader->core->payload_max);
    if (reader->device != reader->core->device)
        (void)close(reader->device);
}

/* Read and handle one request; false at the end of the mount. */
static bool read_one(struct core *core, struct reader *reader)
{
    static struct log_limit limit;
    ssize_t nbytes = read(reader->device, reader->request, request_room(core));
    if (nbytes > 0) {
        requests_handle(core, reader, reader->request, (size_t)nbytes);
        return true;
    }
    if (nbytes == 0 || errno == ENODEV || errno == ECONNABORTED || errno == EPERM) {
        atomic_store(&core->is_unmounted, true);
        core_wake_main(core);
        return false;
    }
    /* ENOENT: the request was taken back while it was read. */
    if (errno != EINTR && errno != EAGAIN && errno != ENOENT) {
        log_limited(&limit, "reading /dev/fuse: %s", strerror(errno));
        sleep_ms(10);
    }
    return true;
}

static void *run(void *argument)
{
    struct reader *reader = argument;
    struct core *core = reader->core;
    atomic_store(&reader->thread_id, (int)gettid());
    while (!atomic_load(&core->is_ending) && read_one(core, reader))
        atomic_store(&reader->is_stuck, false);
    atomic_store(&reader->thread_id, 0);
    core_end_thread(core);
    return NULL;
}

int reader_start(struct core *core)
{
    /* Called by main before there are others, then by the watchdog alone. */
    unsigned index = atomic_load(&core->reader_count);
    if (index >= READERS_MAX)
        return -ENFILE;
    struct reader *reader = &core->readers[index];
    int device = device_clone(core->device);
    if (device < 0)
        device = core->device;
    int status = reader_prepare(reader, core, device);
    if (status != 0) {
        if (device != core->device)
            (void)close(device);
        return status;
    }
    atomic_store(&core->reader_count, index + 1);
    status = core_start_thread(core, run, reader);
    if (status != 0) {
        atomic_store(&core->reader_count, index);
        reader_dispose(reader);
    }
    return status;
}

static void kick(int thread_id)
{
    if (thread_id != 0)
        (void)syscall(SYS_tgkill, (int)getpid(), thread_id, SIGUSR2);
}

void reader_kick_all(struct core *core)
{
    kick(atomic_load(&core->pump_thread_id));
    unsigned readers = atomic_load(&core->reader_count);
    for (unsigned i = 0; i < readers; i++)
        kick(atomic_load(&core->readers[i].thread_id));
}

void reader_begin_job(struct reader *reader, const struct fuse_in_header *header, uint64_t nbytes)
{
    reader_begin_job_within(reader, header, nbytes, reader->core->options.deadline_ms);
}

void reader_begin_job_within(struct reader *reader, const struct fuse_in_header *header,
                             uint64_t nbytes, uint32_t deadline_ms)
{
    atomic_store_explicit(&reader->job_pid, header->pid, memory_order_relaxed);
    int64_t more_ms = (int64_t)deadline_ms - (int64_t)reader->core->options.deadline_ms;
    int64_t deadline = core_deadline_ns(reader->core, nbytes, false) + more_ms * NS_PER_MS;
    atomic_store_explicit(&reader->job_deadline_ns, deadline, memory_order_relaxed);
    atomic_store_explicit(&reader->job, header->unique, memory_order_release);
}

/* Uniques are never used again, so that an exchange cannot take a later job for this one. */
static bool end_job(struct reader *reader, uint64_t unique)
{
    return atomic_compare_exchange_strong(&reader->job, &unique, 0);
}

bool reader_end_job(struct reader *reader)
{
    uint64_t unique = atomic_load(&reader->job);
    return unique != 0 && end_job(reader, unique);
}

bool reader_find_job(struct core *core, uint64_t unique, uint32_t *pid)
{
    unsigned readers = atomic_load(&core->reader_count);
    for (unsigned i = 0; i < readers; i++) {
        if (atomic_load(&core->readers[i].job) == unique) {
            *pid = atomic_load(&core->readers[i].job_pid);
            return true;
        }
    }
    return false;
}

bool reader_answer_job(struct core *core, uint64_t unique, int error)
{
    unsigned readers = atomic_load(&core->reader_count);
    for (unsigned i = 0; i < readers; i++) {
        struct reader *reader = &core->readers[i];
        if (atomic_load(&reader->job) == unique && end_job(reader, unique)) {
            (void)device_reply_error(reader->device, unique, error);
            return true;
        }
    }
    return false;
}

unsigned reader_answer_overdue(struct core *core, int64_t now)
{
    unsigned stuck = 0;
    unsigned readers = atomic_load(&core->reader_count);
    for (unsigned i = 0; i < readers; i++) {
        struct reader *reader = &core->readers[i];
        uint64_t unique = atomic_load_explicit(&reader->job, memory_order_acquire);
        if (unique == 0 || atomic_load(&reader->job_deadline_ns) > now ||
            !end_job(reader, unique))
            continue;
        count(&core->counters.deadline_hits, 1);
        (void)device_reply_error(reader->device, unique, EIO);
        atomic_store(&reader->is_stuck, true);
        stuck++;
    }
    return stuck;
}
