#include "link.h"

#include "log.h"
#include "sockets.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { RECEIVERS = 2, POLL_MS = 50, MEMORY_PAUSE_MS = 5 };

int link_create(struct link *link, int requests, int control, struct pending *pending)
{
    memset(link, 0, sizeof *link);
    link->requests = requests;
    link->control = control;
    link->pending = pending;
    link->tail = &link->head;
    atomic_init(&link->is_up, true);
    atomic_init(&link->generation, 1);
    int status = pthread_rwlock_init(&link->swap, NULL);
    if (status == 0)
        status = pthread_mutex_init(&link->lock, NULL);
    if (status == 0)
        status = pthread_cond_init(&link->wake, NULL);
    return -status;
}

void link_destroy(struct link *link)
{
    while (link->head != NULL) {
        struct queued *queued = link->head;
        link->head = queued->next;
        free(queued);
    }
    (void)pthread_cond_destroy(&link->wake);
    (void)pthread_mutex_destroy(&link->lock);
    (void)pthread_rwlock_destroy(&link->swap);
}

/* Try to send now. 1: sent, or no longer wanted; 0: later; -EMSGSIZE: never. */
static int try_send(struct link *link, uint64_t unique, const void *bytes, size_t nbytes)
{
    int status = 0;
    bool is_lost = false;
    pthread_rwlock_rdlock(&link->swap);
    unsigned generation = atomic_load(&link->generation);
    if (atomic_load(&link->is_up) && !atomic_load(&link->is_held)) {
        if (unique != 0 && !pending_send(link->pending, unique)) {
            status = 1;
        } else {
            int sent = sockets_send_nowait(link->requests, bytes, nbytes);
            status = sent == 0 ? 1 : sent == -EMSGSIZE ? sent : 0;
            is_lost = sent == -EPIPE || sent == -ECONNRESET || sent == -ENOTCONN;
            if (sent != 0 && unique != 0)
                pending_unsend(link->pending, unique);
            if (sent == -ENOMEM || sent == -ENOBUFS)
                sleep_ms(MEMORY_PAUSE_MS);
        }
    }
    pthread_rwlock_unlock(&link->swap);
    if (is_lost)
        link_lost(link, generation);
    return status;
}

static int enqueue(struct link *link, uint64_t unique, const void *bytes, size_t nbytes)
{
    struct queued *queued = malloc(sizeof *queued + nbytes);
    if (queued == NULL)
        return -ENOMEM;
    queued->next = NULL;
    queued->unique = unique;
    queued->nbytes = nbytes;
    memcpy(queued->bytes, bytes, nbytes);
    int status = -ENOBUFS;
    pthread_mutex_lock(&link->lock);
    if (link->queue_bytes + nbytes <= QUEUE_BYTES_MAX &&
        atomic_load(&link->queue_count) < QUEUE_COUNT_MAX) {
        *link->tail = queued;
        link->tail = &queued->next;
        link->queue_bytes += nbytes;
        atomic_fetch_add(&link->queue_count, 1);
        pthread_cond_broadcast(&link->wake);
        status = 0;
    }
    pthread_mutex_unlock(&link->lock);
    if (status != 0)
        free(queued);
    return status;
}

int link_send(struct link *link, uint64_t unique, const void *bytes, size_t nbytes)
{
    if (atomic_load(&link->queue_count) == 0) {
        int status = try_send(link, unique, bytes, nbytes);
        if (status != 0)
            return status > 0 ? 0 : status;
    }
    return enqueue(link, unique, bytes, nbytes);
}

/* The oldest message, when there is an owner to send it to; NULL at the end. */
static struct queued *wait_queued(struct link *link)
{
    pthread_mutex_lock(&link->lock);
    while (!link->is_ending && (link->head == NULL || !atomic_load(&link->is_up) ||
                                atomic_load(&link->is_held)))
        pthread_cond_wait(&link->wake, &link->lock);
    struct queued *queued = link->is_ending ? NULL : link->head;
    pthread_mutex_unlock(&link->lock);
    return queued;
}

static void pop(struct link *link)
{
    pthread_mutex_lock(&link->lock);
    struct queued *queued = link->head;
    link->head = queued->next;
    if (link->head == NULL)
        link->tail = &link->head;
    link->queue_bytes -= queued->nbytes;
    atomic_fetch_sub(&link->queue_count, 1);
    pthread_mutex_unlock(&link->lock);
    free(queued);
}

void link_run_sender(struct link *link)
{
    struct queued *queued;
    /* The message stays in the queue while it is sent, so that later ones queue behind it. */
    while ((queued = wait_queued(link)) != NULL) {
        int status = try_send(link, queued->unique, queued->bytes, queued->nbytes);
        if (status != 0) {
            pop(link);
        } else {
            struct pollfd poller = {.fd = link->requests, .events = POLLOUT};
            (void)poll(&poller, 1, POLL_MS);
        }
    }
}

void link_hold(struct link *link, bool is_held)
{
    pthread_rwlock_wrlock(&link->swap); /* who is sending has sent */
    pthread_mutex_lock(&link->lock);
    atomic_store(&link->is_held, is_held);
    pthread_cond_broadcast(&link->wake);
    pthread_mutex_unlock(&link->lock);
    pthread_rwlock_unlock(&link->swap);
}

void link_lost(struct link *link, unsigned generation)
{
    bool is_first = false;
    pthread_mutex_lock(&link->lock);
    /* At the core's own end nobody is lost. */
    if (!link->is_ending && atomic_load(&link->generation) == generation &&
        atomic_load(&link->is_up)) {
        atomic_store(&link->is_up, false);
        (void)shutdown(link->requests, SHUT_RDWR);
        (void)shutdown(link->control, SHUT_RDWR);
        is_first = true;
    }
    pthread_mutex_unlock(&link->lock);
    if (is_first)
        link->on_lost(link->on_lost_argument);
}

bool link_wait_owner(struct link *link, unsigned *generation)
{
    pthread_mutex_lock(&link->lock);
    link->parked++;
    pthread_cond_broadcast(&link->wake);
    while (!link->is_ending &&
           (!atomic_load(&link->is_up) || atomic_load(&link->generation) == *generation))
        pthread_cond_wait(&link->wake, &link->lock);
    link->parked--; /* an owner that was lost again before this thread woke is none to it */
    *generation = atomic_load(&link->generation);
    bool goes_on = !link->is_ending;
    pthread_mutex_unlock(&link->lock);
    return goes_on;
}

void link_wait_parked(struct link *link)
{
    pthread_mutex_lock(&link->lock);
    while (link->parked < RECEIVERS && !link->is_ending)
        pthread_cond_wait(&link->wake, &link->lock);
    pthread_mutex_unlock(&link->lock);
}

int link_renew(struct link *link, int requests, int control, const void *init, size_t nbytes)
{
    int status = 0;
    pthread_rwlock_wrlock(&link->swap);
    pthread_mutex_lock(&link->lock);
    if (dup3(requests, link->requests, O_CLOEXEC) < 0 ||
        dup3(control, link->control, O_CLOEXEC) < 0)
        status = -errno;
    if (status == 0 && nbytes > 0)
        status = sockets_send_nowait(link->requests, init, nbytes);
    if (status == 0) {
        atomic_fetch_add(&link->generation, 1);
        atomic_store(&link->is_held, false);
        atomic_store(&link->is_up, true);
        pthread_cond_broadcast(&link->wake);
    }
    pthread_mutex_unlock(&link->lock);
    pthread_rwlock_unlock(&link->swap);
    return status;
}

void link_end(struct link *link)
{
    pthread_mutex_lock(&link->lock);
    link->is_ending = true;
    /* Not the requests: the owner's libfuse would complain of an end of file, or when it answers
     * late. The thread that receives there is taken out by a signal. */
    (void)shutdown(link->control, SHUT_RDWR);
    pthread_cond_broadcast(&link->wake);
    pthread_mutex_unlock(&link->lock);
}
