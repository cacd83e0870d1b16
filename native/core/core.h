/* The whole: what the threads of the core share.
 *
 *   readers (2 to 16)   read requests from /dev/fuse; answer them, or send them to the owner
 *   sender              sends what the owner's socket did not take at once
 *   pump                takes the owner's replies to the kernel
 *   notifier            takes its notifications to the kernel
 *   control             answers the owner's control messages
 *   watchdog            answers EIO for what is overdue
 *   main                signals, the owner's death, the end
 *
 * No lock is held while any of them waits for a device, the kernel or the owner. */
#ifndef CORE_CORE_H
#define CORE_CORE_H

#include "backings.h"
#include "files.h"
#include "filter.h"
#include "link.h"
#include "log.h"
#include "mount.h"
#include "notify.h"
#include "options.h"
#include "page_cache.h"
#include "pending.h"
#include "protocol.h"
#include "segments.h"

enum { READERS_MAX = 16, INIT_BYTES_MAX = 256, CONTROL_VERSION = 2,
       MESSAGE_HEADERS = 256 /* of a socket's message, the longest before a payload, and some */ };

/* In the order of the STATUS answer. */
struct counters {
    _Atomic(uint64_t) requests_native_read;
    _Atomic(uint64_t) bytes_native_read;
    _Atomic(uint64_t) requests_native_write;
    _Atomic(uint64_t) bytes_native_write;
    _Atomic(uint64_t) lookups_answered;
    _Atomic(uint64_t) forwarded;
    _Atomic(uint64_t) deadline_hits;
    _Atomic(uint64_t) interrupts;
    _Atomic(uint64_t) verify_failures;
    _Atomic(uint64_t) faults;
    _Atomic(uint64_t) respawns;
};

static inline void count(_Atomic(uint64_t) *counter, uint64_t amount)
{
    atomic_fetch_add_explicit(counter, amount, memory_order_relaxed);
}

/* The kernel's INIT, kept for the owners to come. */
struct init {
    pthread_mutex_t lock;
    pthread_cond_t wake;
    uint8_t bytes[INIT_BYTES_MAX];
    size_t nbytes;         /* 0: it has not come yet */
    uint64_t offered;      /* flags of the kernel */
    atomic_bool is_answered;
};

struct core;

/* A thread that reads requests, and what it is at. */
struct reader {
    struct core *core;
    int device;
    atomic_int thread_id; /* 0: it runs no more */
    uint8_t *request; /* so placed that the bytes of a WRITE start a page */
    uint8_t *buffer;  /* payload_max bytes, touched only when needed */
    _Atomic(uint64_t) job; /* unique of the request that it answers itself, 0: none */
    _Atomic(int64_t) job_deadline_ns;
    _Atomic(uint32_t) job_pid; /* of the thread that waits for it */
    atomic_bool is_stuck; /* its request was answered by the watchdog */
};

struct core {
    struct options options;
    struct mount mount;
    int device; /* the first descriptor: notifications and backing ids */
    int door;   /* -1: there is none; the main thread's */
    bool may_pass_through;
    uint32_t max_pages;
    uint32_t max_write;
    size_t payload_max;
    const uint8_t *zeroes; /* payload_max of them */
    struct link link;
    struct pending pending;
    struct segments segments;
    struct backings backings;
    struct files files;
    struct filter filter;
    struct notify notify;
    struct page_cache page_cache;
    struct init init;
    struct counters counters;
    struct reader readers[READERS_MAX];
    atomic_uint reader_count;
    atomic_int pump_thread_id; /* 0: it runs no more */
    atomic_uint thread_count; /* threads that run, but main */
    pthread_t main_thread;
    atomic_bool is_given; /* whoever was to come by the door may not stay: HOLD */
    atomic_bool is_lost;       /* the owner; for the main thread */
    atomic_bool is_ending;
    atomic_bool is_unmounted;  /* the kernel says so */
    atomic_bool is_stop_asked; /* STOP */
    _Atomic(uint64_t) own_unique;
    _Atomic(int64_t) allowed_ns; /* more time for all that waits for the owner */
};

/* Wake the main thread. */
void core_wake_main(struct core *core);

/* When a request must be answered that moves so many bytes; by the owner, or here. */
int64_t core_deadline_ns(const struct core *core, uint64_t nbytes, bool is_forwarded);

/* Start a counted thread; 0 or -errno. */
int core_start_thread(struct core *core, void *(*body)(void *), void *argument);
void core_end_thread(struct core *core);

#endif
