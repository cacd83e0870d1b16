#include "setup.h"

#include "guard.h"
#include "init.h"
#include "reader.h"
#include "sockets.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    PAGES_DEFAULT = 256, /* where the kernel does not tell */
    PAGES_MAX = 1024,
    OWNER_PAGES_MAX = 256, /* libfuse's buffer */
};

static void close_between(int first, int last)
{
    if (first <= last)
        (void)syscall(SYS_close_range, (unsigned)first, (unsigned)last, 0);
}

void setup_descriptors(const struct options *options)
{
    const int kept[] = {options->requests, options->control, options->door};
    int first = STDERR_FILENO + 1;
    for (;;) {
        int next = INT32_MAX;
        for (size_t i = 0; i < sizeof kept / sizeof *kept; i++)
            if (kept[i] >= first && kept[i] < next)
                next = kept[i];
        if (next == INT32_MAX)
            break;
        close_between(first, next - 1);
        first = next + 1;
    }
    close_between(first, INT32_MAX);
}

static uint32_t pages_of_kernel(void)
{
    unsigned pages = 0;
    FILE *file = fopen("/proc/sys/fs/fuse/max_pages_limit", "re");
    if (file == NULL)
        return PAGES_DEFAULT;
    if (fscanf(file, "%u", &pages) != 1 || pages == 0)
        pages = PAGES_DEFAULT;
    (void)fclose(file);
    return pages;
}

static uint32_t smaller(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

bool setup_sockets(struct core *core)
{
    const int fds[] = {core->options.requests, core->options.control, core->options.door};
    for (size_t i = 0; i < sizeof fds / sizeof *fds; i++) {
        if (i == 2 && fds[i] < 0)
            continue;
        if (sockets_message_max(fds[i]) == 0 || fcntl(fds[i], F_SETFD, FD_CLOEXEC) != 0) {
            log_line("descriptor %d is no SOCK_SEQPACKET socket", fds[i]);
            return false;
        }
    }
    core->door = core->options.door;
    size_t message_max = sockets_message_max(core->options.requests);
    if (message_max < MESSAGE_HEADERS + PAGE) {
        log_line("the requests socket carries %zu bytes: raise its SO_SNDBUF", message_max);
        return false;
    }
    size_t fitting = (message_max - MESSAGE_HEADERS) / PAGE;
    core->max_pages = smaller(pages_of_kernel(), PAGES_MAX);
    if (fitting < core->max_pages)
        core->max_pages = (uint32_t)fitting;
    core->max_write = smaller(core->max_pages, OWNER_PAGES_MAX) * PAGE;
    core->payload_max = (size_t)core->max_pages * PAGE;
    return true;
}

/* CAP_SYS_ADMIN, which backing files need. */
static bool is_admin(void)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3];
    if (syscall(SYS_capget, &header, data) != 0)
        return false;
    return (data[CAP_TO_INDEX(CAP_SYS_ADMIN)].effective & CAP_TO_MASK(CAP_SYS_ADMIN)) != 0;
}

/* Each segment takes a descriptor. */
static void raise_descriptor_limit(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        limit.rlim_cur = limit.rlim_max;
        (void)setrlimit(RLIMIT_NOFILE, &limit);
    }
}

int setup_create(struct core *core)
{
    raise_descriptor_limit();
    core->may_pass_through = !core->options.no_passthrough && is_admin();
    void *zeroes = mmap(NULL, core->payload_max, PROT_READ,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (zeroes == MAP_FAILED)
        return -errno;
    core->zeroes = zeroes;
    int status = kvfs_guard_install();
    if (status == 0)
        status = pending_create(&core->pending);
    if (status == 0)
        status = link_create(&core->link, core->options.requests, core->options.control,
                             &core->pending);
    if (status == 0)
        status = segments_create(&core->segments);
    if (status == 0)
        status = backings_create(&core->backings, core->device);
    if (status == 0)
        status = files_create(&core->files, &core->backings);
    if (status == 0)
        status = filter_create(&core->filter);
    if (status == 0)
        status = notify_create(&core->notify);
    if (status == 0)
        status = page_cache_create(&core->page_cache, &core->notify,
                                   (uint64_t)core->options.page_cache_mb << 20);
    if (status == 0)
        status = init_create(&core->init);
    return status;
}

void setup_destroy(struct core *core)
{
    for (unsigned i = 0; i < atomic_load(&core->reader_count); i++)
        reader_dispose(&core->readers[i]);
    files_destroy(&core->files);
    segments_destroy(&core->segments);
    filter_destroy(&core->filter);
    page_cache_destroy(&core->page_cache);
    notify_destroy(&core->notify);
    link_destroy(&core->link);
    pending_destroy(&core->pending);
    init_destroy(&core->init);
    (void)munmap((void *)core->zeroes, core->payload_max);
}
