/* What the core's answers have put into the kernel's page cache: oldest first, within a limit.
 *
 * The pages are copies of blocks that a pool holds already, some of them in memory. So they are
 * dropped with a file's last close, and the oldest when there are too many. What the kernel has
 * dropped by itself is counted still. Thread-safety: any thread. */
#ifndef CORE_PAGE_CACHE_H
#define CORE_PAGE_CACHE_H

#include "notify.h"

#include <pthread.h>
#include <stdint.h>

enum { CACHE_BUCKETS = 1024, CACHE_RANGES_MAX = 1 << 16 };

/* Bytes of one inode that were answered in one go. */
struct cached_range {
    struct cached_range *older, *newer;    /* of all; `newer` of the newest is NULL */
    struct cached_range *before, *after;   /* in the bucket of the inode */
    uint64_t nodeid, offset, nbytes;
};

struct page_cache {
    pthread_mutex_t lock;
    struct notify *notify;
    uint64_t limit; /* bytes */
    uint64_t nbytes;
    unsigned count;
    struct cached_range *oldest, *newest;
    struct cached_range *buckets[CACHE_BUCKETS];
};

int page_cache_create(struct page_cache *cache, struct notify *notify, uint64_t limit);
void page_cache_destroy(struct page_cache *cache);

/* Bytes of an inode went to the kernel, for its cache. Has it drop the oldest above the limit. */
void page_cache_note(struct page_cache *cache, uint64_t nodeid, uint64_t offset, uint64_t nbytes);

/* Whether anything of an inode is counted. */
bool page_cache_has(struct page_cache *cache, uint64_t nodeid);

/* Have the kernel drop all pages of an inode. */
void page_cache_drop(struct page_cache *cache, uint64_t nodeid);

uint64_t page_cache_bytes(struct page_cache *cache);

#endif
