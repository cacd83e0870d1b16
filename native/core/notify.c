#include "notify.h"

#include "device.h"
#include "log.h"

#include <stdlib.h>
#include <string.h>

int notify_create(struct notify *notify)
{
    memset(notify, 0, sizeof *notify);
    notify->tail = &notify->head;
    int status = pthread_mutex_init(&notify->lock, NULL);
    if (status == 0)
        status = pthread_cond_init(&notify->wake, NULL);
    return -status;
}

void notify_destroy(struct notify *notify)
{
    while (notify->head != NULL) {
        struct notification *first = notify->head;
        notify->head = first->next;
        free(first);
    }
    (void)pthread_cond_destroy(&notify->wake);
    (void)pthread_mutex_destroy(&notify->lock);
}

static struct notification *make(int device, const void *bytes, size_t nbytes)
{
    struct notification *made;
    while ((made = malloc(sizeof *made + nbytes)) == NULL)
        sleep_ms(10); /* a lost invalidation would leave stale bytes behind */
    *made = (struct notification){.device = device, .nbytes = nbytes};
    memcpy(made->bytes, bytes, nbytes);
    return made;
}

/* REQUIRES: the lock. */
static void append(struct notify *notify, struct notification *made)
{
    *notify->tail = made;
    notify->tail = &made->next;
    notify->nbytes += made->nbytes;
    pthread_cond_broadcast(&notify->wake);
}

void notify_push(struct notify *notify, const void *bytes, size_t nbytes)
{
    struct notification *made = make(-1, bytes, nbytes);
    pthread_mutex_lock(&notify->lock);
    while (notify->nbytes > NOTIFY_BYTES_MAX && !notify->is_ending)
        pthread_cond_wait(&notify->wake, &notify->lock);
    append(notify, made);
    pthread_mutex_unlock(&notify->lock);
}

bool notify_push_after(struct notify *notify, int device, const void *bytes, size_t nbytes)
{
    pthread_mutex_lock(&notify->lock);
    bool must_wait = (notify->head != NULL || notify->is_writing) && !notify->is_ending;
    if (must_wait)
        append(notify, make(device, bytes, nbytes));
    pthread_mutex_unlock(&notify->lock);
    return must_wait;
}

static struct notification *wait_first(struct notify *notify)
{
    pthread_mutex_lock(&notify->lock);
    notify->is_writing = false;
    while (notify->head == NULL && !notify->is_ending)
        pthread_cond_wait(&notify->wake, &notify->lock);
    struct notification *first = notify->is_ending ? NULL : notify->head;
    if (first != NULL) {
        notify->head = first->next;
        if (notify->head == NULL)
            notify->tail = &notify->head;
        notify->nbytes -= first->nbytes;
        notify->is_writing = true;
        pthread_cond_broadcast(&notify->wake);
    }
    pthread_mutex_unlock(&notify->lock);
    return first;
}

void notify_run(struct notify *notify, int device)
{
    struct notification *first;
    while ((first = wait_first(notify)) != NULL) {
        /* ENOENT is usual: the kernel does not know the inode or name any more. */
        (void)device_write(first->device < 0 ? device : first->device, first->bytes,
                           first->nbytes);
        free(first);
    }
}

void notify_end(struct notify *notify)
{
    pthread_mutex_lock(&notify->lock);
    notify->is_ending = true;
    pthread_cond_broadcast(&notify->wake);
    pthread_mutex_unlock(&notify->lock);
}
