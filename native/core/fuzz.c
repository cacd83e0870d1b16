/* Feeds arbitrary bytes to what parses them: requests of the kernel, replies and control messages
 * of the owner. For builds with sanitizers; the device is /dev/null and nothing is mounted.
 *
 *   kvfs-core-fuzz [SEED [SECONDS]]
 *
 * Prints the seed first; the same seed makes the same inputs. Exit status 0: survived. */
#include "control.h"
#include "init.h"
#include "reader.h"
#include "replies.h"
#include "requests.h"
#include "setup.h"
#include "sockets.h"
#include "threads.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

enum { BODY_MAX = 6000, FD_BYTES = 1 << 18, CHECK_EVERY = 256, RESET_EVERY = 20000 };

static uint64_t random_state;

static uint64_t next_random(void)
{
    /* SplitMix64. */
    uint64_t value = random_state += UINT64_C(0x9e3779b97f4a7c15);
    value = (value ^ (value >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    value = (value ^ (value >> 27)) * UINT64_C(0x94d049bb133111eb);
    return value ^ (value >> 31);
}

static uint64_t below(uint64_t limit)
{
    return next_random() % limit;
}

/* Numbers that parsers stumble over. */
static uint64_t odd_number(void)
{
    static const uint64_t known[] = {
        0, 1, 2, 3, 100, 4095, 4096, 4097, 65536, FD_BYTES, INT32_MAX, UINT32_MAX,
        UINT64_C(1) << 32, INT64_MAX, UINT64_C(1) << 63, UINT64_MAX - 4095, UINT64_MAX,
    };
    switch (below(4)) {
    case 0:
        return known[below(sizeof known / sizeof *known)];
    case 1:
        return next_random();
    case 2:
        return below(64) * 4096;
    default:
        return below(8);
    }
}

/* Fill with words of which most are small or odd. */
static void fill(uint8_t *bytes, size_t nbytes)
{
    for (size_t at = 0; at < nbytes; at += 4) {
        uint32_t word = (uint32_t)odd_number();
        bool is_wide = nbytes - at >= 8 && below(2) == 0;
        uint64_t wide = odd_number();
        if (is_wide)
            memcpy(bytes + at, &wide, sizeof wide);
        else
            memcpy(bytes + at, &word, nbytes - at < 4 ? nbytes - at : 4);
        if (is_wide)
            at += 4;
    }
}

/* Exactly so many bytes, so that a sanitizer sees the first one beyond. */
static uint8_t *make(size_t nbytes, size_t room)
{
    uint8_t *bytes = malloc(room > 0 ? room : 1);
    if (bytes == NULL)
        abort();
    fill(bytes, nbytes);
    return bytes;
}

static void feed_request(struct core *core, struct reader *reader)
{
    static const uint32_t liked[] = {FUSE_READ, FUSE_WRITE, FUSE_FALLOCATE, FUSE_LOOKUP,
                                     FUSE_OPEN, FUSE_CREATE, FUSE_RELEASE, FUSE_INTERRUPT};
    size_t nbytes = below(3) > 0 ? IN_HEADER + below(200) : below(BODY_MAX);
    uint8_t *bytes = make(nbytes, nbytes);
    if (nbytes >= IN_HEADER && below(20) > 0) {
        struct fuse_in_header header = {
            .len = (uint32_t)nbytes,
            .opcode = below(2) ? liked[below(8)] : (uint32_t)below(64),
            .unique = below(64) * 2,
            .nodeid = below(6),
        };
        memcpy(bytes, &header, sizeof header);
        if (nbytes >= IN_HEADER + 20 && below(2)) {
            store64(bytes + IN_HEADER, below(6));                     /* fh */
            store64(bytes + IN_HEADER + 8, below(FD_BYTES));          /* offset */
            store32(bytes + IN_HEADER + 16, (uint32_t)below(300000)); /* size */
        }
    }
    requests_handle(core, reader, bytes, nbytes);
    free(bytes);
}

static void feed_reply(struct core *core)
{
    size_t nbytes = below(3) > 0 ? OUT_HEADER + below(300) : below(BODY_MAX);
    uint8_t *bytes = make(nbytes, nbytes < INIT_BYTES_MAX ? INIT_BYTES_MAX : nbytes);
    if (nbytes >= OUT_HEADER && below(20) > 0) {
        struct fuse_out_header header = {
            .len = (uint32_t)nbytes,
            .error = below(2) ? 0 : (int32_t)below(12) - 6,
            .unique = below(64) * 2 | (below(10) == 0 ? UNIQUE_OWN : 0),
        };
        memcpy(bytes, &header, sizeof header);
    }
    replies_handle(core, bytes, nbytes);
    free(bytes);
}

static int make_fd(void)
{
    int fd = memfd_create("fuzz", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0)
        abort();
    if (ftruncate(fd, below(4) ? FD_BYTES : 0) != 0)
        abort();
    /* Else a FALLOCATE takes all memory of the machine. */
    if (fcntl(fd, F_ADD_SEALS, F_SEAL_GROW) != 0)
        abort();
    uint64_t header[4] = {UINT64_C(0x314d414e5346564b), UINT64_C(1) << below(12), below(2), 7};
    if (below(2) && pwrite(fd, header, sizeof header, 0) < 0 && errno != EPERM)
        abort();
    return fd;
}

/* Make likely what is rarely met by chance: a table that is served. */
static void shape_control(uint32_t type, uint8_t *payload, size_t nbytes)
{
    enum { BLOCKS = 4, STRIDE = 8192 };
    if (type == 2 && nbytes >= 16) {
        store64(payload, FD_BYTES);
        store64(payload + 8, FD_BYTES);
    } else if (type == 4 && nbytes >= 32) {
        store64(payload, below(6));
        store64(payload + 8, BLOCKS * STRIDE - below(STRIDE));
        store64(payload + 16, STRIDE);
        store32(payload + 24, BLOCKS);
        store32(payload + 28, (uint32_t)below(2));
    } else if (type == 5 && nbytes >= 8 + BLOCKS * 48) {
        store32(payload, 0);
        store32(payload + 4, BLOCKS);
        for (uint32_t i = 0; i < BLOCKS; i++) {
            store32(payload + 8 + i * 48, (uint32_t)below(4));
            store64(payload + 8 + i * 48 + 8, below(20) * 4096);
            store64(payload + 8 + i * 48 + 16, below(STRIDE + 1));
        }
    } else if (type == 7 && nbytes >= 24) {
        store64(payload, below(6));
        store64(payload + 8, FD_BYTES);
        store64(payload + 16, below(3) * 4096);
    }
}

static void feed_control(struct core *core)
{
    static uint8_t answer[CONTROL_BYTES_MAX];
    size_t nbytes = below(3) > 0 ? CONTROL_HEADER + below(300) : below(BODY_MAX);
    uint8_t *bytes = make(nbytes, nbytes);
    if (nbytes >= CONTROL_HEADER && below(20) > 0) {
        uint32_t type = (uint32_t)below(18);
        store32(bytes, type);
        if (below(4) > 0)
            store64(bytes + 8, below(6));
        if (below(2))
            shape_control(type, bytes + CONTROL_HEADER, nbytes - CONTROL_HEADER);
    }
    size_t size = control_handle(core, bytes, nbytes, below(2) ? make_fd() : -1, answer);
    if (size < CONTROL_HEADER || size > sizeof answer)
        abort();
    free(bytes);
}

static void send_control(struct core *core, uint32_t type, uint64_t argument, size_t nbytes)
{
    static uint8_t answer[CONTROL_BYTES_MAX];
    uint8_t *bytes = make(CONTROL_HEADER + nbytes, CONTROL_HEADER + nbytes);
    store32(bytes, type);
    store64(bytes + 8, argument);
    shape_control(type, bytes + CONTROL_HEADER, nbytes);
    (void)control_handle(core, bytes, CONTROL_HEADER + nbytes,
                         type == 2 || type == 7 ? make_fd() : -1, answer);
    free(bytes);
}

/* Install a lane as an owner would. */
static void feed_lane(struct core *core)
{
    uint64_t fh = below(6);
    send_control(core, 10, fh, 0);
    if (below(3) == 0) {
        send_control(core, 7, fh, 24);
        return;
    }
    for (uint64_t ref = 0; ref < 4; ref++)
        send_control(core, 2, ref, 16);
    send_control(core, 4, fh, 32);
    send_control(core, 5, fh, 200);
    send_control(core, 6, fh, 0);
}

static void feed_init(struct core *core, struct reader *reader)
{
    struct {
        struct fuse_in_header header;
        struct fuse_init_in body;
    } init = {
        .header = {.len = sizeof init, .opcode = FUSE_INIT, .unique = 2},
        .body = {.major = 7, .minor = 45, .flags = UINT32_MAX, .flags2 = UINT32_MAX},
    };
    requests_handle(core, reader, (const uint8_t *)&init, sizeof init);
}

static void drain(int fd)
{
    char byte[16];
    while (recv(fd, byte, sizeof byte, MSG_DONTWAIT | MSG_TRUNC) > 0)
        ;
}

static void ignore_loss(void *argument)
{
    (void)argument;
}

static void *run_notify(void *argument)
{
    struct core *core = argument;
    notify_run(&core->notify, core->device);
    return NULL;
}

static void set_up(struct core *core, int requests[2], int control[2])
{
    sigset_t blocked;
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGUSR1);
    (void)pthread_sigmask(SIG_BLOCK, &blocked, NULL);
    char *arguments[] = {"fuzz", "--requests", "3", "--control", "4", "/", "deadline_ms=10", NULL};
    if (!options_parse(&core->options, 7, arguments) || sockets_pair(requests) != 0 ||
        sockets_pair(control) != 0)
        abort();
    core->options.requests = requests[0];
    core->options.control = control[0];
    core->main_thread = pthread_self();
    core->device = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (!setup_sockets(core) || setup_create(core) != 0)
        abort();
    core->link.on_lost = ignore_loss;
}

int main(int count, char **arguments)
{
    static struct core core;
    static struct reader reader;
    int requests[2], control[2];
    uint64_t seed = count > 1 ? strtoull(arguments[1], NULL, 10) : (uint64_t)now_ns();
    int64_t seconds = count > 2 ? strtoll(arguments[2], NULL, 10) : 5;
    (void)printf("seed %llu\n", (unsigned long long)seed);
    (void)fflush(stdout);
    random_state = seed;
    set_up(&core, requests, control);
    pthread_t notifier;
    if (reader_prepare(&reader, &core, core.device) != 0 ||
        pthread_create(&notifier, NULL, run_notify, &core) != 0)
        abort();
    feed_init(&core, &reader);
    int64_t end = now_ns() + seconds * NS_PER_S;
    uint64_t rounds = 0;
    for (; rounds % CHECK_EVERY != 0 || now_ns() < end; rounds++) {
        switch (below(30) == 0 ? 3 : below(3)) {
        case 0:
            feed_request(&core, &reader);
            break;
        case 1:
            feed_reply(&core);
            break;
        case 2:
            feed_control(&core);
            break;
        default:
            feed_lane(&core);
        }
        drain(requests[1]);
        if (rounds % CHECK_EVERY == 0)
            threads_check_deadlines(&core);
        if (rounds % RESET_EVERY == 0) {
            threads_fail_pending(&core, below(2) == 0, 5);
            filter_remove(&core.filter);
            files_next_owner(&core.files);
            segments_drop_all(&core.segments);
        }
    }
    notify_end(&core.notify);
    (void)pthread_join(notifier, NULL);
    reader_dispose(&reader);
    setup_destroy(&core);
    (void)printf("%llu inputs: %llu native reads, %llu native writes, %llu names, %llu forwarded, "
                 "%llu faults, %llu not verified\n",
                 (unsigned long long)rounds,
                 (unsigned long long)core.counters.requests_native_read,
                 (unsigned long long)core.counters.requests_native_write,
                 (unsigned long long)core.counters.lookups_answered,
                 (unsigned long long)core.counters.forwarded,
                 (unsigned long long)core.counters.faults,
                 (unsigned long long)core.counters.verify_failures);
    return 0;
}
