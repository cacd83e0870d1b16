/* A lease page: what one client process holds, so that the owner does not recycle it meanwhile.
 *
 * A place is a number that means one life of one segment: device u8 << 56 | slot u24 << 32 |
 * generation u32; never 0. Two memfds per client:
 *
 *   page    written by the client, read by the owner: a heartbeat, and places (hazard pointers)
 *   notice  written by the owner, read by the client: whether the page has been revoked, and how
 *           many segments that the client may have mapped have been freed
 *
 * Client, before it reads:   look the index up; publish the places (full fence); look it up again.
 *                            The same records: the places are held until they are released.
 * Owner, before it recycles: take the records out of the index; ask whether a page holds the place
 *                            (full fence). Not held: no client can come to hold it any more.
 * Whichever fence comes first, one of the two sees what the other did.
 *
 * A revoked page holds nothing. Its client learns of it after it has read: what it has read since
 * may be other bytes (kvfs_lease_page_is_revoked orders itself after all earlier loads).
 *
 * Both sides may misbehave: sizes are checked once against sealed files, and nothing that is read
 * from the other side is used as an index, a bound or an address.
 *
 * A forked child shares the page with its parent, whose holds it must not end: what it attached is
 * the parent's, hold fails with -ECHILD there, release does nothing.
 *
 * Thread-safety: hold and release are serialised by an inner mutex; the rest runs on any thread.
 * create, attach and destroy belong to one thread. Errors are -errno. */
#ifndef KVFS_LEASE_PAGE_H
#define KVFS_LEASE_PAGE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <pthread.h>
#include <sys/types.h>

#define KVFS_LEASE_SLOTS_MAX ((uint64_t)1 << 16)

struct kvfs_page_header;
struct kvfs_notice;

struct kvfs_lease_page {
    struct kvfs_page_header *header;
    _Atomic uint64_t *slots;
    struct kvfs_notice *notice;
    size_t mapped_bytes;
    uint32_t slot_count; /* a private copy */
    int fd;              /* owned, as is notice_fd */
    int notice_fd;
    bool is_client;
    uint32_t fork_count; /* forks between the first process and the one that attached */
    /* The client's own book-keeping; the page is only ever written. Chains are of slot numbers
     * plus one, 0 ends them. */
    uint64_t *places;
    uint32_t *counts;
    uint32_t *next;
    uint32_t *buckets;
    uint32_t free_slots;
    pthread_mutex_t lock;
    /* The heart: a thread that says that this process runs. */
    pthread_t heart;
    pthread_cond_t heart_stop;
    pthread_mutex_t heart_lock;
    pid_t heart_pid; /* a forked child has no such thread */
    bool is_beating;
    bool is_stopping;
    uint32_t interval_ms;
};

/* Make both memfds, as the owner. */
int kvfs_lease_page_create(struct kvfs_lease_page *page, uint64_t slot_count);

/* Map a page and its notice, as the client; the descriptors are duplicated. Returns 0, -errno, or
 * -EBADMSG with a static text in *reason if they are not sound. */
int kvfs_lease_page_attach(struct kvfs_lease_page *page, int fd, int notice_fd,
                           const char **reason);

void kvfs_lease_page_destroy(struct kvfs_lease_page *page);

/* Client: hold places, each once more; a full fence ends it. -ENOSPC if there are too many; then
 * none is held by this call. REQUIRES: no place is 0. */
int kvfs_lease_page_hold(struct kvfs_lease_page *page, const uint64_t *places, size_t count);

/* Client: undo one hold of each; places that are not held are passed over. */
void kvfs_lease_page_release(struct kvfs_lease_page *page, const uint64_t *places, size_t count);

/* Client: whether what was read so far may be something else than what was held. */
bool kvfs_lease_page_is_revoked(const struct kvfs_lease_page *page);

/* Client: start the heart. */
int kvfs_lease_page_beat(struct kvfs_lease_page *page, uint32_t interval_ms);

/* Owner: whether the client holds a place, after everything that this thread did before. A
 * revoked page holds nothing. */
bool kvfs_lease_page_is_held(const struct kvfs_lease_page *page, uint64_t place);

/* Owner: copy the places, at most room; returns how many there are. */
size_t kvfs_lease_page_places(const struct kvfs_lease_page *page, uint64_t *places, size_t room);

/* Owner: take all places away; on return the client's next look at the notice says so. */
void kvfs_lease_page_revoke(struct kvfs_lease_page *page);

/* Owner: tell the client that one more segment of which it may have a map is gone. */
void kvfs_lease_page_note_freed(struct kvfs_lease_page *page);

/* How many segments are gone since the page was made; what the client compares with before. */
uint64_t kvfs_lease_page_freed(const struct kvfs_lease_page *page);

/* When the heart last beat, by CLOCK_MONOTONIC; 0 before the first time. The client's word. */
uint64_t kvfs_lease_page_heartbeat_ns(const struct kvfs_lease_page *page);

#endif
