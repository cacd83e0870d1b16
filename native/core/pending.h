/* Requests that wait for the owner's answer.
 *
 * An entry is QUEUED until its message leaves, SENT until the owner answers, and ANSWERED when the
 * core answered in the owner's place: then it is kept so that the late reply can be undone.
 * Whoever takes an entry out of QUEUED or SENT, and nobody else, answers the kernel.
 * Thread-safety: any thread; one mutex, held for book-keeping only. */
#ifndef CORE_PENDING_H
#define CORE_PENDING_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { PENDING_MAX = 16384, PENDING_BUCKETS = 4096, INTERRUPTS_KEPT = 64 };

enum pending_state { PENDING_FREE = 0, PENDING_QUEUED, PENDING_SENT, PENDING_ANSWERED };

struct pending_request {
    uint64_t unique;
    uint64_t nodeid;
    uint64_t fh;       /* of the request, where it has one */
    uint64_t argument; /* size of a WRITE, new size of a SETATTR (UINT64_MAX: unchanged) */
    uint32_t opcode;
    uint32_t open_flags;
    uint32_t pid; /* of the thread that waits; 0: none that is known */
    int device;
    int64_t deadline_ns;
    int64_t interrupted_ns; /* when a signal came; 0: none */
};

struct pending_entry {
    struct pending_request request;
    enum pending_state state;
    uint32_t chain;              /* next in the bucket, or in the free list */
    uint32_t older, newer;       /* all that are in use, oldest first */
};

struct pending {
    pthread_mutex_t lock;
    struct pending_entry *entries; /* PENDING_MAX + 1; 0 is nobody, and the head of the list */
    uint32_t buckets[PENDING_BUCKETS];
    uint32_t free;
    atomic_uint waiting;     /* QUEUED and SENT */
    atomic_uint interrupted; /* of these */
    /* Interrupts that came before the reader noted the request that they name. */
    uint64_t early[INTERRUPTS_KEPT];
    unsigned early_at;
    unsigned early_count;
};

int pending_create(struct pending *pending);
void pending_destroy(struct pending *pending);

/* Note a request, QUEUED. 0, -ENOMEM when there are too many, or -EINVAL. */
int pending_add(struct pending *pending, const struct pending_request *request);

/* The message is about to leave. False if the request was answered meanwhile: do not send it. */
bool pending_send(struct pending *pending, uint64_t unique);

/* The message did not leave after all. */
void pending_unsend(struct pending *pending, uint64_t unique);

enum taken { TAKEN_NONE, TAKEN_OPEN, TAKEN_LATE };

/* The owner answered: take the request out. OPEN: the caller must answer the kernel. LATE: the
 * kernel was answered before. */
enum taken pending_take(struct pending *pending, uint64_t unique,
                        struct pending_request *request);

/* Answer in the owner's place. True: the caller must answer the kernel. */
bool pending_answer(struct pending *pending, uint64_t unique, struct pending_request *request);

/* A signal came for whoever waits; remembered if the request is not noted yet. */
void pending_interrupt(struct pending *pending, uint64_t unique, int64_t now);

/* Copy requests that were interrupted and are not answered; returns how many. */
size_t pending_interrupted(struct pending *pending, struct pending_request *requests,
                           size_t room);

/* Answer in the owner's place what is overdue; returns how many requests were filled in. */
size_t pending_overdue(struct pending *pending, int64_t now, struct pending_request *requests,
                       size_t room);

/* The owner is gone: take out all that were sent, or with `is_all` all; forget what was answered.
 * Returns how many were filled in; call again until it returns 0. */
size_t pending_drain(struct pending *pending, bool is_all, struct pending_request *requests,
                     size_t room);

#endif
