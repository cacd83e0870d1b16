/* The socket to the owner: sending without waiting, a queue for when it does not keep up, and its
 * replacement when the owner died.
 *
 * - Readers never block here: what the socket does not take is queued for the sender thread.
 * - The descriptors keep their numbers when the owner changes.
 * Thread-safety: any thread. */
#ifndef CORE_LINK_H
#define CORE_LINK_H

#include "pending.h"

#include <pthread.h>

enum { QUEUE_BYTES_MAX = 64 << 20, QUEUE_COUNT_MAX = 32768 };

struct queued {
    struct queued *next;
    uint64_t unique; /* 0: not in the pending table */
    size_t nbytes;
    uint8_t bytes[];
};

struct link {
    pthread_rwlock_t swap; /* readers: sending; writer: a new owner's sockets are put in place */
    pthread_mutex_t lock;  /* all below but the atomics */
    pthread_cond_t wake;
    int requests, control;
    atomic_bool is_up;
    atomic_bool is_held; /* nothing is sent, all is queued */
    atomic_uint generation;
    atomic_uint queue_count;
    size_t queue_bytes;
    struct queued *head, **tail;
    unsigned parked; /* threads that wait for an owner */
    bool is_ending;
    struct pending *pending;
    void (*on_lost)(void *argument); /* called once per loss */
    void *on_lost_argument;
};

int link_create(struct link *link, int requests, int control, struct pending *pending);
void link_destroy(struct link *link);

/* Send to the owner, or queue. `unique` is that of a request noted in the pending table, or 0.
 * 0, or -ENOBUFS, -ENOMEM, -EMSGSIZE: it will not be sent. */
int link_send(struct link *link, uint64_t unique, const void *bytes, size_t nbytes);

/* The sender thread: sends what was queued, until the end. */
void link_run_sender(struct link *link);

/* This owner is gone; whoever sees it first tells the main thread. */
void link_lost(struct link *link, unsigned generation);

/* Wait for an owner later than *generation (0: any) and note it. False at the end. */
bool link_wait_owner(struct link *link, unsigned *generation);

/* Wait until no receiving thread uses the sockets of the owner that was lost. */
void link_wait_parked(struct link *link);

/* Queue what is to be sent from now on, or send it again. */
void link_hold(struct link *link, bool is_held);

/* A new owner: take its sockets, which replace the old ones, and send it `init` first. */
int link_renew(struct link *link, int requests, int control, const void *init, size_t nbytes);

/* Let all threads that wait here go. */
void link_end(struct link *link);

#endif
