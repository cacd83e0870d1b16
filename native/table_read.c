/* Lookups: lock-free, batched, bounded. */
#include "hash.h"
#include "table.h"
#include "table_layout.h"

#include <string.h>

#define XXH_INLINE_ALL
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wconversion"
#pragma GCC diagnostic ignored "-Wsign-conversion"
#pragma GCC diagnostic ignored "-Wshadow"
#include "vendor/xxhash/xxhash.h"
#pragma GCC diagnostic pop

/* Keys whose slots are fetched before the first is looked at. */
enum { AHEAD = 16 };

struct wanted {
    uint64_t key[4];
    uint64_t home;
};

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
                      unsigned *tries, uint64_t best[SLOT_WORDS])
{
    uint64_t words[SLOT_WORDS];
    uint64_t probes = table_probes(table);
    bool is_found = false;
    for (uint64_t probe = 0; probe < probes; probe++) {
        if (!slot_read(table_slot(table, wanted->home + probe), words, tries))
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
                     unsigned *tries, uint64_t words[SLOT_WORDS])
{
    uint64_t probes = table_probes(table);
    for (uint64_t probe = 0; probe < probes; probe++) {
        if (!slot_read(table_slot(table, wanted->home + probe), words, tries))
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
    unsigned tries = READ_TRIES;
    for (size_t first = 0; first < count; first += AHEAD) {
        size_t taken = prepare(table, keys + first * KVFS_KEY_BYTES, count - first, wanted);
        for (size_t i = 0; i < taken; i++) {
            uint64_t words[SLOT_WORDS] = {0};
            bool is_found = device == KVFS_ANY_DEVICE
                                ? find_best(table, &wanted[i], &tries, words)
                                : find_one(table, &wanted[i], device, &tries, words);
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
    unsigned tries = READ_TRIES;
    for (size_t first = 0; first < count; first += AHEAD) {
        size_t taken = prepare(table, keys + first * KVFS_KEY_BYTES, count - first, wanted);
        for (size_t i = 0; i < taken; i++)
            if (!find_one(table, &wanted[i], KVFS_ANY_DEVICE, &tries, words))
                return first + i;
    }
    return count;
}

size_t kvfs_table_snapshot(struct kvfs_table *table, uint8_t *records, size_t room)
{
    uint64_t words[SLOT_WORDS];
    size_t found = 0;
    unsigned tries = READ_TRIES;
    for (uint64_t i = 0; i <= table->mask; i++) {
        if (!slot_read(table_slot(table, i), words, &tries) || !slot_is_live(words))
            continue;
        if (found < room)
            slot_to_record(records + found * KVFS_RECORD_BYTES, words);
        found++;
    }
    return found;
}
