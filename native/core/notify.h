/* Notifications from the owner to the kernel, on a thread of their own: the kernel may hold one up
 * until a request is answered, so whoever answers requests must not write it. Answers that must not
 * overtake them go the same way. */
#ifndef CORE_NOTIFY_H
#define CORE_NOTIFY_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { NOTIFY_BYTES_MAX = 64 << 20 };

struct notification {
    struct notification *next;
    int device; /* -1: the first */
    size_t nbytes;
    uint8_t bytes[];
};

struct notify {
    pthread_mutex_t lock;
    pthread_cond_t wake;
    struct notification *head, **tail;
    size_t nbytes;
    bool is_writing; /* one that is not in the list any more */
    bool is_ending;
};

int notify_create(struct notify *notify);
void notify_destroy(struct notify *notify);

/* Queue a whole message. Waits while the queue is full: nothing is dropped. That cannot be for
 * ever, for the watchdog answers the requests which hold up the notifications. */
void notify_push(struct notify *notify, const void *bytes, size_t nbytes);

/* Queue an answer for this descriptor behind the notifications, if there are any; else false. */
bool notify_push_after(struct notify *notify, int device, const void *bytes, size_t nbytes);

/* The thread; writes to the first descriptor of the device. */
void notify_run(struct notify *notify, int device);

void notify_end(struct notify *notify);

#endif
