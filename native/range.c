/* The registry of ranges: chunks of slots, linked, never freed, so that a handler on any thread
 * may walk them without a lock at any time. */
#include "range.h"

#include "guard.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>

enum { CHUNK_SLOTS = 64, PAGE = 4096 };

#define NO_OFFSET UINT64_MAX

/* A slot is free while end is 0. `users` counts handlers that may be mapping into the range: a
 * handler counts itself first and looks at the bounds after, kvfs_range_remove clears the bounds
 * first and looks at the count after (both sequentially consistent). */
struct kvfs_range {
    atomic_uintptr_t start;
    atomic_uintptr_t end;
    atomic_uint users;
    atomic_uint faults;
    size_t align;
    bool is_taken; /* under registry_lock */
    _Atomic uint64_t offsets[KVFS_FAULTS_MAX];
};

struct chunk {
    struct kvfs_range slots[CHUNK_SLOTS];
    struct chunk *next; /* set before the chunk is published */
};

static _Atomic(struct chunk *) chunks;
static pthread_mutex_t registry_lock = PTHREAD_MUTEX_INITIALIZER;

static struct kvfs_range *take_slot(void)
{
    struct chunk *first = atomic_load(&chunks);
    for (struct chunk *chunk = first; chunk != NULL; chunk = chunk->next)
        for (int i = 0; i < CHUNK_SLOTS; i++)
            if (!chunk->slots[i].is_taken)
                return &chunk->slots[i];
    struct chunk *fresh = calloc(1, sizeof *fresh);
    if (fresh == NULL)
        return NULL;
    fresh->next = first;
    atomic_store(&chunks, fresh);
    return &fresh->slots[0];
}

struct kvfs_range *kvfs_range_add(uintptr_t start, size_t nbytes, size_t align)
{
    pthread_mutex_lock(&registry_lock);
    struct kvfs_range *range = take_slot();
    if (range != NULL) {
        range->is_taken = true;
        range->align = align;
        atomic_store(&range->faults, 0);
        for (int i = 0; i < KVFS_FAULTS_MAX; i++)
            atomic_store(&range->offsets[i], NO_OFFSET);
        atomic_store(&range->start, start);
        atomic_store(&range->end, start + nbytes);
    }
    pthread_mutex_unlock(&registry_lock);
    return range;
}

void kvfs_range_remove(struct kvfs_range *range)
{
    atomic_store(&range->end, 0);
    atomic_store(&range->start, 0);
    while (atomic_load(&range->users) != 0)
        sched_yield();
    pthread_mutex_lock(&registry_lock);
    range->is_taken = false;
    pthread_mutex_unlock(&registry_lock);
}

uint32_t kvfs_range_faults(const struct kvfs_range *range)
{
    return atomic_load(&range->faults);
}

size_t kvfs_range_offsets(const struct kvfs_range *range, uint64_t offsets[KVFS_FAULTS_MAX])
{
    size_t count = 0;
    for (size_t i = 0; i < KVFS_FAULTS_MAX; i++) {
        uint64_t offset = atomic_load(&range->offsets[i]);
        if (offset != NO_OFFSET)
            offsets[count++] = offset;
    }
    return count;
}

static bool map_zeroes(uintptr_t start, size_t nbytes)
{
    void *mapped = mmap((void *)start, nbytes, PROT_READ,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
    return mapped != MAP_FAILED;
}

static bool repair(struct kvfs_range *range, uintptr_t start, uintptr_t end, uintptr_t address)
{
    uintptr_t page = address & ~(uintptr_t)(PAGE - 1);
    uintptr_t unit = address & ~(uintptr_t)(range->align - 1);
    bool done = map_zeroes(page, PAGE);
    if (!done && unit >= start && end - unit >= range->align)
        done = map_zeroes(unit, range->align);
    /* Splitting a mapping may need more mappings than the process may have; replacing all of it
     * never does. The view has failed as a whole either way. */
    if (!done)
        done = map_zeroes(start, end - start);
    if (!done)
        return false;
    unsigned index = atomic_fetch_add(&range->faults, 1);
    if (index < KVFS_FAULTS_MAX)
        atomic_store(&range->offsets[index], page - start);
    return true;
}

bool kvfs_range_repair(uintptr_t address)
{
    for (struct chunk *chunk = atomic_load(&chunks); chunk != NULL; chunk = chunk->next) {
        for (int i = 0; i < CHUNK_SLOTS; i++) {
            struct kvfs_range *range = &chunk->slots[i];
            if (atomic_load(&range->end) == 0)
                continue;
            atomic_fetch_add(&range->users, 1);
            uintptr_t end = atomic_load(&range->end);
            uintptr_t start = atomic_load(&range->start);
            bool done = start != 0 && start <= address && address < end &&
                        repair(range, start, end, address);
            atomic_fetch_sub(&range->users, 1);
            if (done)
                return true;
        }
    }
    return false;
}
