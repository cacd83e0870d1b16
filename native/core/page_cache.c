#include "page_cache.h"

#include "protocol.h"

#include <stdlib.h>

enum { RANGE_BYTES_MAX = 16 << 20 };

int page_cache_create(struct page_cache *cache, struct notify *notify, uint64_t limit)
{
    memset(cache, 0, sizeof *cache);
    cache->notify = notify;
    cache->limit = limit;
    return -pthread_mutex_init(&cache->lock, NULL);
}

static struct cached_range **bucket_of(struct page_cache *cache, uint64_t nodeid)
{
    return &cache->buckets[nodeid % CACHE_BUCKETS];
}

/* REQUIRES: the lock. */
static void add(struct page_cache *cache, struct cached_range *range)
{
    struct cached_range **bucket = bucket_of(cache, range->nodeid);
    range->older = cache->newest;
    range->newer = NULL;
    if (cache->newest != NULL)
        cache->newest->newer = range;
    else
        cache->oldest = range;
    cache->newest = range;
    range->before = NULL;
    range->after = *bucket;
    if (*bucket != NULL)
        (*bucket)->before = range;
    *bucket = range;
    cache->nbytes += range->nbytes;
    cache->count++;
}

/* REQUIRES: the lock. The range is the caller's then. */
static void take(struct page_cache *cache, struct cached_range *range)
{
    if (range->older != NULL)
        range->older->newer = range->newer;
    else
        cache->oldest = range->newer;
    if (range->newer != NULL)
        range->newer->older = range->older;
    else
        cache->newest = range->older;
    if (range->before != NULL)
        range->before->after = range->after;
    else
        *bucket_of(cache, range->nodeid) = range->after;
    if (range->after != NULL)
        range->after->before = range->before;
    cache->nbytes -= range->nbytes;
    cache->count--;
}

void page_cache_destroy(struct page_cache *cache)
{
    while (cache->oldest != NULL) {
        struct cached_range *range = cache->oldest;
        take(cache, range);
        free(range);
    }
    (void)pthread_mutex_destroy(&cache->lock);
}

/* Have the kernel drop pages: `nbytes` of 0 means up to the end. */
static void invalidate(struct page_cache *cache, uint64_t nodeid, uint64_t offset, uint64_t nbytes)
{
    struct {
        struct fuse_out_header header;
        struct fuse_notify_inval_inode_out body;
    } message = {
        .header = {.len = sizeof message, .error = FUSE_NOTIFY_INVAL_INODE},
        .body = {.ino = nodeid, .off = (int64_t)offset, .len = (int64_t)nbytes},
    };
    notify_push(cache->notify, &message, sizeof message);
}

/* Take the oldest ranges above the limit; they hang together by `newer`. REQUIRES: the lock. */
static struct cached_range *take_surplus(struct page_cache *cache)
{
    struct cached_range *first = NULL, **link = &first;
    while (cache->oldest != NULL &&
           (cache->nbytes > cache->limit || cache->count > CACHE_RANGES_MAX)) {
        struct cached_range *range = cache->oldest;
        take(cache, range);
        range->newer = NULL;
        *link = range;
        link = &range->newer;
    }
    return first;
}

void page_cache_note(struct page_cache *cache, uint64_t nodeid, uint64_t offset, uint64_t nbytes)
{
    if (nbytes == 0)
        return;
    pthread_mutex_lock(&cache->lock);
    struct cached_range *last = cache->newest;
    if (last != NULL && last->nodeid == nodeid && last->offset + last->nbytes == offset &&
        last->nbytes + nbytes <= RANGE_BYTES_MAX) {
        last->nbytes += nbytes;
        cache->nbytes += nbytes;
    } else {
        struct cached_range *range = calloc(1, sizeof *range);
        if (range != NULL) { /* else these pages are left to the kernel */
            range->nodeid = nodeid;
            range->offset = offset;
            range->nbytes = nbytes;
            add(cache, range);
        }
    }
    struct cached_range *surplus = take_surplus(cache);
    pthread_mutex_unlock(&cache->lock);
    while (surplus != NULL) {
        struct cached_range *range = surplus;
        surplus = range->newer;
        invalidate(cache, range->nodeid, range->offset, range->nbytes);
        free(range);
    }
}

bool page_cache_has(struct page_cache *cache, uint64_t nodeid)
{
    pthread_mutex_lock(&cache->lock);
    const struct cached_range *range = *bucket_of(cache, nodeid);
    while (range != NULL && range->nodeid != nodeid)
        range = range->after;
    pthread_mutex_unlock(&cache->lock);
    return range != NULL;
}

void page_cache_drop(struct page_cache *cache, uint64_t nodeid)
{
    pthread_mutex_lock(&cache->lock);
    struct cached_range *next;
    for (struct cached_range *range = *bucket_of(cache, nodeid); range != NULL; range = next) {
        next = range->after;
        if (range->nodeid == nodeid) {
            take(cache, range);
            free(range);
        }
    }
    pthread_mutex_unlock(&cache->lock);
    invalidate(cache, nodeid, 0, 0);
}

uint64_t page_cache_bytes(struct page_cache *cache)
{
    pthread_mutex_lock(&cache->lock);
    uint64_t nbytes = cache->nbytes;
    pthread_mutex_unlock(&cache->lock);
    return nbytes;
}
