#include "lease_page.h"

#include "memory.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { HEADER_BYTES = 4096, NOTICE_BYTES = 4096, PAGE_VERSION = 1, HEART_STACK_BYTES = 1 << 16 };

#define PAGE_MAGIC UINT64_C(0x3153414c5346564b)   /* "KVFSLAS1" */
#define NOTICE_MAGIC UINT64_C(0x3143494e5346564b) /* "KVFSNIC1" */

struct kvfs_page_header {
    uint64_t magic;
    uint32_t version;
    uint32_t slot_count;
    uint8_t reserved[48];
    _Atomic uint64_t heartbeat_ns;
};

struct kvfs_notice {
    uint64_t magic;
    uint32_t version;
    uint32_t reserved;
    _Atomic uint64_t is_revoked;
    _Atomic uint64_t freed; /* 0 for ever where the owner does not count */
};

static_assert(offsetof(struct kvfs_page_header, heartbeat_ns) == 64, "shared between processes");
static_assert(offsetof(struct kvfs_notice, is_revoked) == 16, "shared between processes");
static_assert(offsetof(struct kvfs_notice, freed) == 24, "shared between processes");

/* How often this process was forked since the first one attached; asking for its id at every hold
 * would be a system call. */
static uint32_t forks;
static pthread_once_t forks_once = PTHREAD_ONCE_INIT;

static void count_fork(void)
{
    forks++;
}

static void watch_forks(void)
{
    (void)pthread_atfork(NULL, NULL, count_fork);
}

static size_t page_bytes(uint64_t slot_count)
{
    return HEADER_BYTES + (size_t)slot_count * sizeof(uint64_t);
}

static int map_both(struct kvfs_lease_page *page, size_t nbytes, int page_access,
                    int notice_access)
{
    void *mapped = mmap(NULL, nbytes, page_access, MAP_SHARED, page->fd, 0);
    if (mapped == MAP_FAILED)
        return -errno;
    page->header = mapped;
    page->slots = (_Atomic uint64_t *)(void *)((char *)mapped + HEADER_BYTES);
    page->mapped_bytes = nbytes;
    mapped = mmap(NULL, NOTICE_BYTES, notice_access, MAP_SHARED, page->notice_fd, 0);
    if (mapped == MAP_FAILED)
        return -errno;
    page->notice = mapped;
    return 0;
}

static void start(struct kvfs_lease_page *page)
{
    memset(page, 0, sizeof *page);
    page->fd = page->notice_fd = -1;
    pthread_mutex_init(&page->lock, NULL);
    pthread_mutex_init(&page->heart_lock, NULL);
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&page->heart_stop, &attributes);
    pthread_condattr_destroy(&attributes);
}

int kvfs_lease_page_create(struct kvfs_lease_page *page, uint64_t slot_count)
{
    if (slot_count == 0 || slot_count > KVFS_LEASE_SLOTS_MAX)
        return -EINVAL;
    start(page);
    int status = page->fd = kvfs_memfd("kvfs-lease", page_bytes(slot_count), true);
    if (status >= 0)
        status = page->notice_fd = kvfs_memfd("kvfs-notice", NOTICE_BYTES, false);
    if (status >= 0)
        status = map_both(page, page_bytes(slot_count), PROT_READ | PROT_WRITE,
                          PROT_READ | PROT_WRITE);
    if (status == 0)
        status = kvfs_memfd_seal(page->notice_fd, true); /* the client cannot write to it */
    if (status != 0) {
        kvfs_lease_page_destroy(page);
        return status;
    }
    page->slot_count = (uint32_t)slot_count;
    page->header->magic = PAGE_MAGIC;
    page->header->version = PAGE_VERSION;
    page->header->slot_count = page->slot_count;
    page->notice->magic = NOTICE_MAGIC;
    page->notice->version = PAGE_VERSION;
    return 0;
}

static int open_book(struct kvfs_lease_page *page)
{
    page->places = calloc(page->slot_count, sizeof *page->places);
    page->counts = calloc(page->slot_count, sizeof *page->counts);
    page->next = calloc(page->slot_count, sizeof *page->next);
    page->buckets = calloc(page->slot_count, sizeof *page->buckets);
    if (!page->places || !page->counts || !page->next || !page->buckets)
        return -ENOMEM;
    for (uint32_t slot = 0; slot + 1 < page->slot_count; slot++)
        page->next[slot] = slot + 2;
    page->free_slots = 1;
    return 0;
}

/* Size of a sealed file, or -EBADMSG. */
static int64_t sealed_bytes(int fd, int seals_wanted)
{
    struct stat stat;
    int seals = fcntl(fd, F_GET_SEALS);
    if (seals < 0 || (seals & seals_wanted) != seals_wanted || fstat(fd, &stat) != 0)
        return -EBADMSG;
    return stat.st_size;
}

static int attach(struct kvfs_lease_page *page, const char **reason)
{
    int64_t nbytes = sealed_bytes(page->fd, F_SEAL_SHRINK);
    *reason = "not sealed against shrinking, or of another size";
    if (nbytes < HEADER_BYTES || sealed_bytes(page->notice_fd, F_SEAL_SHRINK) != NOTICE_BYTES)
        return -EBADMSG;
    int status = map_both(page, (size_t)nbytes, PROT_READ | PROT_WRITE, PROT_READ);
    if (status != 0)
        return status;
    struct kvfs_page_header header;
    memcpy(&header, page->header, sizeof header);
    *reason = "wrong magic";
    if (header.magic != PAGE_MAGIC || page->notice->magic != NOTICE_MAGIC)
        return -EBADMSG;
    *reason = "unknown version";
    if (header.version != PAGE_VERSION || page->notice->version != PAGE_VERSION)
        return -EBADMSG;
    *reason = "size does not match the slots";
    if (header.slot_count == 0 || header.slot_count > KVFS_LEASE_SLOTS_MAX ||
        page_bytes(header.slot_count) != (size_t)nbytes)
        return -EBADMSG;
    page->slot_count = header.slot_count;
    (void)pthread_once(&forks_once, watch_forks);
    page->fork_count = forks;
    page->is_client = true;
    return open_book(page);
}

int kvfs_lease_page_attach(struct kvfs_lease_page *page, int fd, int notice_fd,
                           const char **reason)
{
    start(page);
    page->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    page->notice_fd = page->fd < 0 ? -1 : fcntl(notice_fd, F_DUPFD_CLOEXEC, 0);
    int status = page->notice_fd < 0 ? -errno : attach(page, reason);
    if (status != 0)
        kvfs_lease_page_destroy(page);
    return status;
}

static void stop_heart(struct kvfs_lease_page *page)
{
    pthread_mutex_lock(&page->heart_lock);
    bool is_beating = page->is_beating;
    page->is_stopping = true;
    page->is_beating = false;
    pthread_cond_signal(&page->heart_stop);
    pthread_mutex_unlock(&page->heart_lock);
    if (is_beating)
        pthread_join(page->heart, NULL);
}

void kvfs_lease_page_destroy(struct kvfs_lease_page *page)
{
    /* In a forked child the heart is not there, though the locks may say so: they are left. */
    bool is_forked = page->heart_pid != 0 && page->heart_pid != getpid();
    if (!is_forked)
        stop_heart(page);
    if (page->header != NULL)
        (void)munmap(page->header, page->mapped_bytes);
    if (page->notice != NULL)
        (void)munmap(page->notice, NOTICE_BYTES);
    if (page->fd >= 0)
        (void)close(page->fd);
    if (page->notice_fd >= 0)
        (void)close(page->notice_fd);
    free(page->places);
    free(page->counts);
    free(page->next);
    free(page->buckets);
    page->header = NULL;
    page->notice = NULL;
    page->places = NULL;
    page->counts = page->next = page->buckets = NULL;
    page->fd = page->notice_fd = -1;
    if (is_forked)
        return;
    pthread_mutex_destroy(&page->lock);
    pthread_mutex_destroy(&page->heart_lock);
    pthread_cond_destroy(&page->heart_stop);
}

/* --- the client's side ------------------------------------------------------------------- */

static uint32_t *bucket_of(struct kvfs_lease_page *page, uint64_t place)
{
    uint64_t mixed = (place ^ place >> 29) * UINT64_C(0x9e3779b97f4a7c15);
    return &page->buckets[(mixed >> 32) % page->slot_count];
}

/* The link that leads to a place's slot, or the 0 that ends its chain. */
static uint32_t *link_to(struct kvfs_lease_page *page, uint64_t place)
{
    uint32_t *link = bucket_of(page, place);
    while (*link != 0 && page->places[*link - 1] != place)
        link = &page->next[*link - 1];
    return link;
}

static bool hold_one(struct kvfs_lease_page *page, uint64_t place)
{
    uint32_t *link = link_to(page, place);
    if (*link == 0) {
        if (page->free_slots == 0)
            return false;
        uint32_t slot = page->free_slots - 1;
        page->free_slots = page->next[slot];
        page->places[slot] = place;
        page->next[slot] = 0;
        *link = slot + 1;
        atomic_store_explicit(&page->slots[slot], place, memory_order_relaxed);
    }
    page->counts[*link - 1]++;
    return true;
}

static void release_one(struct kvfs_lease_page *page, uint64_t place)
{
    uint32_t *link = link_to(page, place);
    if (*link == 0 || --page->counts[*link - 1] > 0)
        return;
    uint32_t slot = *link - 1;
    *link = page->next[slot];
    page->next[slot] = page->free_slots;
    page->free_slots = slot + 1;
    page->places[slot] = 0;
    /* Whoever sees the slot empty sees all reads of what it held as done. */
    atomic_store_explicit(&page->slots[slot], 0, memory_order_release);
}

int kvfs_lease_page_hold(struct kvfs_lease_page *page, const uint64_t *places, size_t count)
{
    if (!page->is_client)
        return -EROFS;
    if (page->fork_count != forks)
        return -ECHILD;
    size_t done = 0;
    pthread_mutex_lock(&page->lock);
    while (done < count && hold_one(page, places[done]))
        done++;
    for (size_t i = 0; done < count && i < done; i++)
        release_one(page, places[i]);
    pthread_mutex_unlock(&page->lock);
    atomic_thread_fence(memory_order_seq_cst);
    return done == count ? 0 : -ENOSPC;
}

void kvfs_lease_page_release(struct kvfs_lease_page *page, const uint64_t *places, size_t count)
{
    if (!page->is_client || page->fork_count != forks)
        return;
    pthread_mutex_lock(&page->lock);
    for (size_t i = 0; i < count; i++)
        release_one(page, places[i]);
    pthread_mutex_unlock(&page->lock);
}

bool kvfs_lease_page_is_revoked(const struct kvfs_lease_page *page)
{
    atomic_thread_fence(memory_order_acquire);
    return atomic_load_explicit(&page->notice->is_revoked, memory_order_relaxed) != 0;
}

static void *beat(void *argument)
{
    struct kvfs_lease_page *page = argument;
    pthread_mutex_lock(&page->heart_lock);
    while (!page->is_stopping) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        uint64_t now_ns = (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
        atomic_store_explicit(&page->header->heartbeat_ns, now_ns, memory_order_relaxed);
        uint64_t next_ns = now_ns + (uint64_t)page->interval_ms * 1000000;
        struct timespec next = {.tv_sec = (time_t)(next_ns / 1000000000),
                                .tv_nsec = (long)(next_ns % 1000000000)};
        (void)pthread_cond_timedwait(&page->heart_stop, &page->heart_lock, &next);
    }
    pthread_mutex_unlock(&page->heart_lock);
    return NULL;
}

int kvfs_lease_page_beat(struct kvfs_lease_page *page, uint32_t interval_ms)
{
    if (!page->is_client)
        return -EROFS;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, HEART_STACK_BYTES);
    pthread_mutex_lock(&page->heart_lock);
    page->interval_ms = interval_ms;
    int status = page->is_beating ? -EALREADY
                                  : -pthread_create(&page->heart, &attributes, beat, page);
    if (status == 0) {
        page->is_beating = true;
        page->heart_pid = getpid();
    }
    pthread_mutex_unlock(&page->heart_lock);
    pthread_attr_destroy(&attributes);
    return status;
}

/* --- the owner's side -------------------------------------------------------------------- */

bool kvfs_lease_page_is_held(const struct kvfs_lease_page *page, uint64_t place)
{
    atomic_thread_fence(memory_order_seq_cst);
    if (atomic_load_explicit(&page->notice->is_revoked, memory_order_relaxed) != 0)
        return false;
    for (uint32_t slot = 0; slot < page->slot_count; slot++)
        if (atomic_load_explicit(&page->slots[slot], memory_order_acquire) == place)
            return true;
    return false;
}

size_t kvfs_lease_page_places(const struct kvfs_lease_page *page, uint64_t *places, size_t room)
{
    size_t found = 0;
    if (kvfs_lease_page_is_revoked(page))
        return 0;
    for (uint32_t slot = 0; slot < page->slot_count; slot++) {
        uint64_t place = atomic_load_explicit(&page->slots[slot], memory_order_relaxed);
        if (place == 0)
            continue;
        if (found < room)
            places[found] = place;
        found++;
    }
    return found;
}

void kvfs_lease_page_revoke(struct kvfs_lease_page *page)
{
    atomic_store_explicit(&page->notice->is_revoked, 1, memory_order_seq_cst);
    /* Before whatever is written next, also by stores that bypass the caches. */
    atomic_thread_fence(memory_order_seq_cst);
}

void kvfs_lease_page_note_freed(struct kvfs_lease_page *page)
{
    atomic_fetch_add_explicit(&page->notice->freed, 1, memory_order_release);
}

uint64_t kvfs_lease_page_freed(const struct kvfs_lease_page *page)
{
    return atomic_load_explicit(&page->notice->freed, memory_order_acquire);
}

uint64_t kvfs_lease_page_heartbeat_ns(const struct kvfs_lease_page *page)
{
    return atomic_load_explicit(&page->header->heartbeat_ns, memory_order_relaxed);
}
