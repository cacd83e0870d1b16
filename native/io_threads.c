#include "io_threads.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/uio.h>
#include <time.h>

struct task {
    uint64_t tag;
    struct kvfs_io_op op;
    int32_t result;
};

/* Two rings of `depth` places: what is to be done, and what is done. */
struct kvfs_io_threads {
    pthread_mutex_t lock;
    pthread_cond_t has_task, has_result;
    unsigned depth, started, idle;
    unsigned task_head, task_tail, done_head, done_tail;
    bool is_closing;
    struct task *tasks, *done;
    pthread_t *handles;
};

static int32_t transfer(const struct kvfs_io_op *op)
{
    struct iovec part = {op->data, op->nbytes};
    ssize_t moved;
    do {
        moved = op->is_write ? pwritev2(op->fd, &part, 1, (off_t)op->offset, op->flags)
                             : preadv2(op->fd, &part, 1, (off_t)op->offset, op->flags);
    } while (moved < 0 && errno == EINTR);
    return moved < 0 ? -errno : (int32_t)moved;
}

static void *work(void *argument)
{
    struct kvfs_io_threads *threads = argument;
    pthread_mutex_lock(&threads->lock);
    for (;;) {
        while (threads->task_head == threads->task_tail && !threads->is_closing) {
            threads->idle++;
            pthread_cond_wait(&threads->has_task, &threads->lock);
            threads->idle--;
        }
        if (threads->is_closing)
            break;
        struct task task = threads->tasks[threads->task_head++ % threads->depth];
        pthread_mutex_unlock(&threads->lock);
        task.result = transfer(&task.op);
        pthread_mutex_lock(&threads->lock);
        threads->done[threads->done_tail++ % threads->depth] = task;
        pthread_cond_signal(&threads->has_result);
    }
    pthread_mutex_unlock(&threads->lock);
    return NULL;
}

int kvfs_io_threads_open(unsigned depth, struct kvfs_io_threads **opened)
{
    struct kvfs_io_threads *threads = calloc(1, sizeof *threads);
    if (threads == NULL)
        return -ENOMEM;
    threads->depth = depth;
    threads->tasks = calloc(depth, sizeof *threads->tasks);
    threads->done = calloc(depth, sizeof *threads->done);
    threads->handles = calloc(depth, sizeof *threads->handles);
    pthread_mutex_init(&threads->lock, NULL);
    pthread_cond_init(&threads->has_task, NULL);
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&threads->has_result, &attributes);
    pthread_condattr_destroy(&attributes);
    if (threads->tasks == NULL || threads->done == NULL || threads->handles == NULL) {
        kvfs_io_threads_close(threads);
        return -ENOMEM;
    }
    *opened = threads;
    return 0;
}

/* Start one more thread; signals are for the threads of the program. */
static int start(struct kvfs_io_threads *threads)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&threads->handles[threads->started], NULL, work, threads);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error == 0)
        threads->started++;
    return -error;
}

int kvfs_io_threads_push(struct kvfs_io_threads *threads, uint64_t tag,
                         const struct kvfs_io_op *op)
{
    int status = 0;
    pthread_mutex_lock(&threads->lock);
    unsigned waiting = threads->task_tail - threads->task_head;
    if (threads->idle <= waiting && threads->started < threads->depth)
        status = start(threads);
    if (threads->started > 0) {
        threads->tasks[threads->task_tail++ % threads->depth] =
            (struct task){.tag = tag, .op = *op};
        pthread_cond_signal(&threads->has_task);
        status = 0;
    }
    pthread_mutex_unlock(&threads->lock);
    return status;
}

int kvfs_io_threads_wait(struct kvfs_io_threads *threads, int timeout_ms)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += timeout_ms / 1000;
    until.tv_nsec += timeout_ms % 1000 * 1000000L;
    if (until.tv_nsec >= 1000000000L) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000L;
    }
    int error = 0;
    pthread_mutex_lock(&threads->lock);
    while (threads->done_head == threads->done_tail && error == 0)
        error = timeout_ms < 0
                    ? pthread_cond_wait(&threads->has_result, &threads->lock)
                    : pthread_cond_timedwait(&threads->has_result, &threads->lock, &until);
    bool is_done = threads->done_head != threads->done_tail;
    pthread_mutex_unlock(&threads->lock);
    return is_done ? 0 : -ETIME;
}

bool kvfs_io_threads_pop(struct kvfs_io_threads *threads, uint64_t *tag, int32_t *result)
{
    pthread_mutex_lock(&threads->lock);
    bool is_done = threads->done_head != threads->done_tail;
    if (is_done) {
        const struct task *task = &threads->done[threads->done_head++ % threads->depth];
        *tag = task->tag;
        *result = task->result;
    }
    pthread_mutex_unlock(&threads->lock);
    return is_done;
}

void kvfs_io_threads_cancel(struct kvfs_io_threads *threads)
{
    pthread_mutex_lock(&threads->lock);
    while (threads->task_head != threads->task_tail) {
        struct task task = threads->tasks[threads->task_head++ % threads->depth];
        task.result = -ECANCELED;
        threads->done[threads->done_tail++ % threads->depth] = task;
    }
    pthread_mutex_unlock(&threads->lock);
}

void kvfs_io_threads_close(struct kvfs_io_threads *threads)
{
    pthread_mutex_lock(&threads->lock);
    threads->is_closing = true;
    pthread_cond_broadcast(&threads->has_task);
    pthread_mutex_unlock(&threads->lock);
    for (unsigned i = 0; i < threads->started; i++)
        pthread_join(threads->handles[i], NULL);
    pthread_cond_destroy(&threads->has_result);
    pthread_cond_destroy(&threads->has_task);
    pthread_mutex_destroy(&threads->lock);
    free(threads->handles);
    free(threads->done);
    free(threads->tasks);
    free(threads);
}
