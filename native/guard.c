#include "guard.h"

#include "range.h"

#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

struct frame {
    sigjmp_buf jump;
    struct frame *outer;
};

/* The initial-exec model reserves the variables when the library is loaded: any other may
 * allocate at the first access, which a signal handler must not. */
#define THREAD_LOCAL static _Thread_local __attribute__((tls_model("initial-exec")))
THREAD_LOCAL struct frame *volatile innermost;
THREAD_LOCAL volatile sig_atomic_t handing_on;

/* Who handled SIGBUS before. Replaced as a whole and never freed: a handler may be reading it. */
static _Atomic(const struct sigaction *) previous;
static pthread_mutex_t install_lock = PTHREAD_MUTEX_INITIALIZER;

static void die(bool is_fault)
{
    struct sigaction action = {.sa_handler = SIG_DFL};
    sigemptyset(&action.sa_mask);
    (void)sigaction(SIGBUS, &action, NULL);
    /* A faulting instruction is run again and meets the default action. */
    if (!is_fault)
        (void)raise(SIGBUS);
}

static void hand_on(int number, siginfo_t *info, void *context, bool is_fault)
{
    const struct sigaction *before = atomic_load_explicit(&previous, memory_order_acquire);
    /* Two handlers that each hold the other as predecessor (faulthandler enabled between two
     * installations) would call each other for ever. */
    if (handing_on || before == NULL) {
        die(is_fault);
        return;
    }
    handing_on = 1;
    if (before->sa_flags & SA_SIGINFO)
        before->sa_sigaction(number, info, context);
    else if (before->sa_handler == SIG_DFL || (before->sa_handler == SIG_IGN && is_fault))
        die(is_fault);
    else if (before->sa_handler != SIG_IGN)
        before->sa_handler(number);
    handing_on = 0;
}

static void on_sigbus(int number, siginfo_t *info, void *context)
{
    int saved_errno = errno;
    /* Signals sent by kill() have codes <= 0; BUS_MCEERR_AO tells of memory that nobody on this
     * thread is touching: neither belongs to what the thread is doing. */
    bool is_fault = info->si_code > 0 && info->si_code != BUS_MCEERR_AO;
    struct frame *frame = innermost;
    if (is_fault && frame != NULL) {
        innermost = frame->outer;
        siglongjmp(frame->jump, 1);
    }
    if (!is_fault || !kvfs_range_repair((uintptr_t)info->si_addr))
        hand_on(number, info, context, is_fault);
    errno = saved_errno;
}

static int install(const struct sigaction *current)
{
    struct sigaction *before = malloc(sizeof *before);
    if (before == NULL)
        return -ENOMEM;
    *before = *current;
    atomic_store_explicit(&previous, before, memory_order_release);
    struct sigaction action = {.sa_sigaction = on_sigbus};
    sigemptyset(&action.sa_mask);
    /* SA_NODEFER: the handler is left by siglongjmp, which restores no mask. */
    action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK | SA_RESTART;
    return sigaction(SIGBUS, &action, NULL) == 0 ? 0 : -errno;
}

int kvfs_guard_install(void)
{
    struct sigaction current;
    if (sigaction(SIGBUS, NULL, &current) != 0)
        return -errno;
    if ((current.sa_flags & SA_SIGINFO) && current.sa_sigaction == on_sigbus)
        return 0;
    int status = 0;
    pthread_mutex_lock(&install_lock);
    if (sigaction(SIGBUS, NULL, &current) != 0)
        status = -errno;
    else if (!(current.sa_flags & SA_SIGINFO) || current.sa_sigaction != on_sigbus)
        status = install(&current);
    pthread_mutex_unlock(&install_lock);
    return status;
}

bool kvfs_guard_run(void (*body)(void *), void *argument)
{
    struct frame frame;
    frame.outer = innermost;
    if (sigsetjmp(frame.jump, 0) != 0)
        return false; /* the handler has put the outer frame back */
    innermost = &frame;
    atomic_signal_fence(memory_order_seq_cst);
    body(argument);
    atomic_signal_fence(memory_order_seq_cst);
    innermost = frame.outer;
    return true;
}
