/* Recycle segments under readers that hold them by lease pages, for a fixed amount of work.
 *
 *   lease_stress [rounds [careless]]
 *
 * One owner, several clients, each with its own handles of the index and a lease page. A segment
 * is a number that says which generation lies in it. The owner takes a segment's record out of
 * the index, asks all pages, and where nobody holds it writes the next generation; now and then it
 * grows the index. A client looks up, holds, looks up again, and then watches the segment: it must
 * not change. With `careless` clients do not look again, and the run must fail: so the test can. */
#include "lease_page.h"
#include "table.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SEGMENTS = 24, CLIENTS = 3, LOOKS = 40, GROW_EVERY = 2000, SLOTS = 8 };

static struct kvfs_table *_Atomic table; /* the current one; older ones stay mapped */
static struct kvfs_lease_page pages[CLIENTS];
static _Atomic uint32_t segments[SEGMENTS];
static atomic_int is_done, is_careless;
static atomic_long reads, overwritten, recycled, held_back;

static void make_key(uint8_t *key, uint32_t segment)
{
    memset(key, 0, KVFS_KEY_BYTES);
    memcpy(key, &segment, sizeof segment);
}

static struct kvfs_record make_record(uint32_t segment, uint32_t generation)
{
    struct kvfs_record record = {.device = 1,
                                 .segment = segment,
                                 .generation = generation,
                                 .length = 1};
    make_key(record.key, segment);
    return record;
}

static uint64_t place_of(uint32_t segment, uint32_t generation)
{
    return (uint64_t)1 << 56 | (uint64_t)segment << 32 | generation;
}

static void watch(struct kvfs_table *index, struct kvfs_lease_page *page, uint32_t segment)
{
    uint8_t key[KVFS_KEY_BYTES];
    struct kvfs_record first, again;
    make_key(key, segment);
    if (kvfs_table_lookup(index, key, 1, KVFS_ANY_DEVICE, (uint8_t *)&first) == 0)
        return;
    uint64_t place = place_of(segment, first.generation);
    if (kvfs_lease_page_hold(page, &place, 1) != 0)
        exit(2);
    bool is_mine = kvfs_table_lookup(index, key, 1, KVFS_ANY_DEVICE, (uint8_t *)&again) == 1 &&
                   again.generation == first.generation && !kvfs_table_is_superseded(index);
    for (int i = 0; (is_mine || atomic_load(&is_careless)) && i < LOOKS; i++) {
        atomic_fetch_add(&reads, 1);
        if (atomic_load_explicit(&segments[segment], memory_order_relaxed) != first.generation) {
            atomic_fetch_add(&overwritten, 1);
            break;
        }
    }
    kvfs_lease_page_release(page, &place, 1);
}

static void *read_all(void *argument)
{
    struct kvfs_lease_page *shared = argument, page;
    const char *reason = NULL;
    uint64_t state = (uintptr_t)argument;
    if (kvfs_lease_page_attach(&page, shared->fd, shared->notice_fd, &reason) != 0 ||
        kvfs_lease_page_beat(&page, 1) != 0)
        exit(2);
    while (!atomic_load(&is_done)) {
        struct kvfs_table index;
        if (kvfs_table_attach(&index, atomic_load(&table)->fd, &reason) != 0)
            exit(2);
        while (!atomic_load(&is_done) && !kvfs_table_is_superseded(&index)) {
            state = state * UINT64_C(6364136223846793005) + 1442695040888963407;
            watch(&index, &page, (uint32_t)(state >> 33) % SEGMENTS);
        }
        kvfs_table_destroy(&index);
    }
    kvfs_lease_page_destroy(&page);
    return NULL;
}

static bool is_held(uint64_t place)
{
    for (int i = 0; i < CLIENTS; i++)
        if (kvfs_lease_page_is_held(&pages[i], place))
            return true;
    return false;
}

static void recycle(uint32_t segment)
{
    uint32_t generation = atomic_load_explicit(&segments[segment], memory_order_relaxed);
    struct kvfs_record record = make_record(segment, generation);
    kvfs_table_remove(atomic_load(&table), (const uint8_t *)&record, 1);
    if (is_held(place_of(segment, generation))) {
        atomic_fetch_add(&held_back, 1); /* its record stays out; asked again next time */
        return;
    }
    atomic_store_explicit(&segments[segment], generation + 1, memory_order_relaxed);
    record = make_record(segment, generation + 1);
    kvfs_table_insert(atomic_load(&table), (const uint8_t *)&record, 1, NULL);
    atomic_fetch_add(&recycled, 1);
}

static void grow(void)
{
    struct kvfs_table *fresh = malloc(sizeof *fresh);
    if (fresh == NULL || kvfs_table_grow(atomic_load(&table), SEGMENTS, fresh) != 0)
        exit(2);
    atomic_store(&table, fresh);
}

int main(int argc, char **argv)
{
    long rounds = argc > 1 ? atol(argv[1]) : 200000;
    pthread_t threads[CLIENTS];
    struct kvfs_table first;
    atomic_store(&is_careless, argc > 2);
    if (kvfs_table_create(&first, SEGMENTS, 7) != 0)
        return 2;
    atomic_store(&table, &first);
    for (uint32_t segment = 0; segment < SEGMENTS; segment++) {
        struct kvfs_record record = make_record(segment, 1);
        atomic_store(&segments[segment], 1);
        kvfs_table_insert(&first, (const uint8_t *)&record, 1, NULL);
    }
    for (int i = 0; i < CLIENTS; i++)
        if (kvfs_lease_page_create(&pages[i], SLOTS) != 0 ||
            pthread_create(&threads[i], NULL, read_all, &pages[i]) != 0)
            return 2;
    for (long i = 0; i < rounds; i++) {
        recycle((uint32_t)i % SEGMENTS);
        if (i % GROW_EVERY == GROW_EVERY - 1)
            grow();
    }
    atomic_store(&is_done, 1);
    for (int i = 0; i < CLIENTS; i++)
        pthread_join(threads[i], NULL);
    printf("%ld recycled, %ld held back, %ld reads, %ld overwritten under a reader\n",
           atomic_load(&recycled), atomic_load(&held_back), atomic_load(&reads),
           atomic_load(&overwritten));
    for (int i = 0; i < CLIENTS; i++)
        kvfs_lease_page_destroy(&pages[i]);
    return atomic_load(&overwritten) == 0 && atomic_load(&recycled) > 0 ? 0 : 1;
}
