/* Lookups: lock-free, batched, bounded. */
#include "hash.h"
#include "table.h"
#include "table_layout.h"

#include <sched.h>
#include <string.h>
#include <time.h>

#define XXH_INLINE_ALL
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wconversion"
#pragma GCC diagnostic ignored "-Wsign-conversion"
#pragma GCC diagnostic ignored "-Wshadow"
#include "vendor/xxhash/xxhash.h"
#pragma GCC diagnostic pop

/* What one batch may spend on slots that are busy: first giving the processor away, then sleeping.
 * A writer that was interrupted between its two stores is back within a time slice or two, and a
 * resident block reported as a miss is dearer than waiting for it. Together about 10 ms. */
enum { WAIT_YIELDS = 32, WAIT_SLEEPS = 100, SLEEP_NS = 50000 };

/* Keys whose slots are fetched before the first is looked at. */
enum { AHEAD = 16 };

struct wanted {
    uint64_t key[4];
    uint64_t home;
};

const unsigned kvfs_table_patience = WAIT_YIELDS + WAIT_SLEEPS;

uint64_t kvfs_table_hash(const struct kvfs_table *table, const uint64_t key[4])
{
    return XXH3_64bits_withSeed(key, KVFS_KEY_BYTES, table->seed);
}

/* Take up to AHEAD keys and start fetching their slots; returns how many. */
static size_t prepare(const struct kvfs_table *table, const uint8_t *keys, size_t count,
                      struct wanted wanted[AHEAD])
{
    size_t taken = count < AHEAD ? count : AHEAD;
    for (size_t i = 0; i < taken; i++) {
        memcpy(wanted[i].key, keys + i * KVFS_KEY_BYTES, KVFS_KEY_BYTES);
        wanted[i].home = XXH3_64bits_withSeed(wanted[i].key, KVFS_KEY_BYTES, table->seed);
        __builtin_prefetch((const void *)table_slot(table, wanted[i].home));
        __builtin_prefetch((const void *)table_slot(table, wanted[i].home + 1));
    }
    return taken;
}

/* Wait for a busy slot; returns false once the batch has no patience left, or if this very change
 * has been waited for in vain before (its writer is dead: every batch would wait again). */
static bool wait_slot(struct kvfs_table *table, const _Atomic uint64_t *slot,
                      uint64_t words[SLOT_WORDS], unsigned *patience)
{
    uint64_t change = words[7] ^ (uint64_t)(slot - table->slots) << 32;
    uint64_t first = words[7];
    if (change == atomic_load_explicit(&table->stuck_change, memory_order_relaxed))
        return false;
    while (*patience > 0) {
        if ((*patience)-- > WAIT_SLEEPS)
            sched_yield();
        else
            nanosleep(&(struct timespec){.tv_nsec = SLEEP_NS}, NULL);
        if (slot_read(slot, words, READ_SPINS))
            return true;
    }
    if (words[7] == first && (first & WRITING_BIT) != 0)
        atomic_store_explicit(&table->stuck_change, change, memory_order_relaxed);
    return false;
}

/* Copy a slot; returns false if it must be passed over. patience starts at the sum of the waits. */
static inline bool read_slot(const struct kvfs_table *table, uint64_t index,
                             uint64_t words[SLOT_WORDS], unsigned *patience)
{
    const _Atomic uint64_t *slot = table_slot(table, index);
    if (slot_read(slot, words, *patience > 0 ? READ_SPINS : 1))
        return true;
    return wait_slot((struct kvfs_table *)(uintptr_t)table, slot, words, patience);
}

static unsigned rank_of(const struct kvfs_table *table, unsigned device)
{
    if (device >= KVFS_RANKS)
        return UINT8_MAX;
    const _Atomic uint64_t *ranks = atomic_load_explicit(
        &((struct kvfs_table *)(uintptr_t)table)->ranks, memory_order_acquire);
    uint64_t word = atomic_load_explicit(&ranks[device / 8], memory_order_relaxed);
    return (unsigned)(word >> (device % 8 * 8)) & UINT8_MAX;
}

static bool is_better(const struct kvfs_table *table, const uint64_t *words, const uint64_t *best)
{
    unsigned device = slot_device(words), best_device = slot_device(best);
    unsigned rank = rank_of(table, device), best_rank = rank_of(table, best_device);
    return rank < best_rank || (rank == best_rank && device < best_device);
}

/* Find the best copy. REQUIRES: best is zero words. */
static bool find_best(const struct kvfs_table *table, const struct wanted *wanted,
                      unsigned *patience, uint64_t best[SLOT_WORDS])
{
    uint64_t words[SLOT_WORDS];
    uint64_t probes = table_probes(table);
    bool is_found = false;
    for (uint64_t probe = 0; probe < probes; probe++) {
        if (!read_slot(table, wanted->home + probe, words, patience))
            continue;
        if (slot_is_empty(words))
            break;
        if (!slot_has_key(words, wanted->key) || !slot_is_live(words))
            continue;
        if (!is_found || is_better(table, words, best))
            memcpy(best, words, sizeof words);
        is_found = true;
        if (!slot_has_copies(words))
            break;
    }
    return is_found;
}

/* Find the copy on one device, or any copy at all (KVFS_ANY_DEVICE). */
static bool find_one(const struct kvfs_table *table, const struct wanted *wanted, int device,
                     unsigned *patience, uint64_t words[SLOT_WORDS])
{
    uint64_t probes = table_probes(table);
    for (uint64_t probe = 0; probe < probes; probe++) {
        if (!read_slot(table, wanted->home + probe, words, patience))
            continue;
        if (slot_is_empty(words))
            return false;
        if (!slot_has_key(words, wanted->key) || !slot_is_live(words))
            continue;
        if (device == KVFS_ANY_DEVICE || slot_device(words) == (unsigned)device)
            return true;
        if (!slot_has_copies(words))
            return false;
    }
    return false;
}

size_t kvfs_table_lookup(const struct kvfs_table *table, const uint8_t *keys, size_t count,
                         int device, uint8_t *records)
{
    struct wanted wanted[AHEAD];
    size_t hits = 0;
    unsigned patience = table->patience;
    for (size_t first = 0; first < count; first += AHEAD) {
        size_t taken = prepare(table, keys + first * KVFS_KEY_BYTES, count - first, wanted);
        for (size_t i = 0; i < taken; i++) {
            uint64_t words[SLOT_WORDS] = {0};
            bool is_found = device == KVFS_ANY_DEVICE
                                ? find_best(table, &wanted[i], &patience, words)
                                : find_one(table, &wanted[i], device, &patience, words);
            if (!is_found)
                memset(words, 0, sizeof words);
            slot_to_record(records + (first + i) * KVFS_RECORD_BYTES, words);
            hits += is_found;
        }
    }
    return hits;
}

size_t kvfs_table_match_prefix(const struct kvfs_table *table, const uint8_t *keys, size_t count)
{
    struct wanted wanted[AHEAD];
    uint64_t words[SLOT_WORDS];
    unsigned patience = table->patience;
    for (size_t first = 0; first < count; first += AHEAD) {
        size_t taken = prepare(table, keys + first * KVFS_KEY_BYTES, count - first, wanted);
        for (size_t i = 0; i < taken; i++)
            if (!find_one(table, &wanted[i], KVFS_ANY_DEVICE, &patience, words))
                return first + i;
    }
    return count;
}

size_t kvfs_table_snapshot(struct kvfs_table *table, uint8_t *records, size_t room)
{
    uint64_t words[SLOT_WORDS];
    size_t found = 0;
    unsigned patience = table->patience;
    for (uint64_t i = 0; i <= table->mask; i++) {
        if (!read_slot(table, i, words, &patience) || !slot_is_live(words))
            continue;
        if (found < room)
            slot_to_record(records + found * KVFS_RECORD_BYTES, words);
        found++;
    }
    return found;
}
