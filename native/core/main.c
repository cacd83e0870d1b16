/* kvfs-core: the process that owns a mount's /dev/fuse. See core.h for its threads. */
#include "core.h"
#include "init.h"
#include "owner.h"
#include "reader.h"
#include "setup.h"
#include "threads.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum { TICK_MS = 200, STOP_WAIT_MS = 200, END_WAIT_MS = 1000, EXIT_FAILURE_CODE = 1 };

static void on_kick(int number)
{
    (void)number; /* takes a reader out of read(2) */
}

/* All threads inherit this; the main thread waits for what is blocked. */
static void set_signals(sigset_t *awaited)
{
    struct sigaction kick = {.sa_handler = on_kick};
    sigemptyset(&kick.sa_mask);
    (void)sigaction(SIGUSR2, &kick, NULL);
    (void)signal(SIGPIPE, SIG_IGN);
    (void)signal(SIGHUP, SIG_IGN);
    sigemptyset(awaited);
    sigaddset(awaited, SIGTERM);
    sigaddset(awaited, SIGINT);
    sigaddset(awaited, SIGCHLD);
    sigaddset(awaited, SIGUSR1);
    (void)pthread_sigmask(SIG_BLOCK, awaited, NULL);
}

static void on_lost(void *argument)
{
    struct core *core = argument;
    atomic_store(&core->is_lost, true);
    core_wake_main(core);
}

/* What the main loop remembers. */
struct progress {
    struct owner owner;
    bool is_announced;
    bool is_detached;
    int64_t end_ns; /* when to end without waiting for the kernel; 0: no time set */
    int code;
};

static void detach(struct core *core, struct progress *progress)
{
    if (!progress->is_detached && !mount_detach(&core->mount))
        log_line("%s stays in the tree: %s", core->mount.path, strerror(errno));
    progress->is_detached = true;
}

/* Look at what happened; false: the core ends. */
static bool advance(struct core *core, struct progress *progress, int signal_number)
{
    if (signal_number == SIGTERM || signal_number == SIGINT) {
        if (progress->is_detached)
            return false; /* the second one does not wait for open files */
        detach(core, progress);
    }
    owner_reap(&progress->owner);
    if (atomic_load(&core->is_unmounted))
        return false;
    if (atomic_load(&core->init.is_answered) && !progress->is_announced) {
        progress->is_announced = true;
        mount_set_read_ahead(&core->mount, core->options.read_ahead_kb);
    }
    if (atomic_load(&core->is_stop_asked) && progress->end_ns == 0) {
        detach(core, progress);
        progress->end_ns = now_ns() + STOP_WAIT_MS * NS_PER_MS;
    }
    if (progress->end_ns != 0 && now_ns() >= progress->end_ns)
        return false;
    if (atomic_exchange(&core->is_lost, false)) {
        /* An owner that asked for the end may go first. */
        if (progress->is_detached) {
            threads_fail_pending(core, true, ENOTCONN);
            return false;
        }
        if (!owner_lost(&progress->owner, core)) {
            progress->code = EXIT_FAILURE_CODE;
            return false;
        }
    }
    if (!owner_look(&progress->owner, core)) {
        progress->code = EXIT_FAILURE_CODE;
        return false;
    }
    return true;
}

static int run(struct core *core, const sigset_t *awaited)
{
    struct progress progress = {.code = 0};
    const struct timespec tick = {.tv_nsec = TICK_MS * NS_PER_MS};
    int number = 0;
    while (advance(core, &progress, number)) {
        number = sigtimedwait(awaited, NULL, &tick);
        if (number < 0)
            number = 0;
    }
    if (!atomic_load(&core->is_unmounted))
        detach(core, &progress);
    return progress.code;
}

/* End the threads; false if some did not end in time. */
static bool end_threads(struct core *core)
{
    atomic_store(&core->is_ending, true);
    threads_fail_pending(core, true, ENOTCONN);
    link_end(&core->link);
    notify_end(&core->notify);
    int64_t end = now_ns() + END_WAIT_MS * NS_PER_MS;
    while (atomic_load(&core->thread_count) > 0 && now_ns() < end) {
        reader_kick_all(core);
        sleep_ms(2);
    }
    return atomic_load(&core->thread_count) == 0;
}

static int start(struct core *core)
{
    core->link.on_lost = on_lost;
    core->link.on_lost_argument = core;
    int status = 0;
    for (unsigned i = 0; i < core->options.threads && status == 0; i++)
        status = reader_start(core);
    return status == 0 ? threads_start(core) : status;
}

int main(int count, char **arguments)
{
    static struct core core;
    sigset_t awaited;
    if (!options_parse(&core.options, count, arguments))
        return 2;
    set_signals(&awaited);
    core.main_thread = pthread_self();
    setup_descriptors(&core.options);
    if (!setup_sockets(&core))
        return 2;
    core.device = mount_open(&core.mount, &core.options);
    if (core.device < 0)
        return EXIT_FAILURE_CODE;
    int status = setup_create(&core);
    if (status == 0)
        status = start(&core);
    if (status != 0) {
        log_line("start failed: %s", strerror(-status));
        (void)mount_detach(&core.mount);
        _exit(EXIT_FAILURE_CODE);
    }
    int code = run(&core, &awaited);
    if (end_threads(&core))
        setup_destroy(&core);
    else
        _exit(code); /* a thread hangs in a device: no waiting for it, nothing it uses is freed */
    return code;
}
