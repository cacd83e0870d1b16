#include "keyset.h"

#include "hash.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

enum { KEY_BYTES = 32 };

/* Open addressing, half full at most; a slot holds a row + 1. */
struct keyset {
    const uint8_t *keys;
    uint32_t *slots;
    size_t mask;
    uint64_t seed; /* random: keys that all fall into one place cannot be prepared */
    const struct kvfs_hash_ops *ops;
};

/* The slot that holds the key, or the empty one where it belongs. */
static uint32_t *slot_of(const struct keyset *set, const uint8_t *key)
{
    size_t at = (size_t)set->ops->hash64(key, KEY_BYTES, set->seed);
    for (;; at++) {
        uint32_t *slot = &set->slots[at & set->mask];
        if (*slot == 0 || memcmp(set->keys + (size_t)(*slot - 1) * KEY_BYTES, key, KEY_BYTES) == 0)
            return slot;
    }
}

static bool open_set(struct keyset *set, const uint8_t *keys, size_t count)
{
    size_t slots = 16;
    while (slots < 2 * count)
        slots *= 2;
    *set = (struct keyset){.keys = keys, .mask = slots - 1, .ops = kvfs_hash_ops()};
    if (getrandom(&set->seed, sizeof set->seed, GRND_NONBLOCK) < 0)
        set->seed = (uintptr_t)set;
    set->slots = calloc(slots, sizeof *set->slots);
    return set->slots != NULL;
}

/* Add a row; returns false if its key is there already. */
static bool add(struct keyset *set, size_t row)
{
    uint32_t *slot = slot_of(set, set->keys + row * KEY_BYTES);
    if (*slot != 0)
        return false;
    *slot = (uint32_t)row + 1;
    return true;
}

int64_t kvfs_distinct_keys(const uint8_t *keys, size_t count, int64_t *firsts)
{
    struct keyset set;
    if (!open_set(&set, keys, count))
        return -ENOMEM;
    int64_t distinct = 0;
    for (size_t row = 0; row < count; row++) {
        int64_t first = (int64_t)row;
        if (add(&set, row))
            memcpy(firsts + distinct++, &first, sizeof first);
    }
    free(set.slots);
    return distinct;
}

int64_t kvfs_find_keys(const uint8_t *keys, size_t count, const uint8_t *among, size_t among_count,
                       int64_t *positions)
{
    struct keyset set;
    if (!open_set(&set, among, among_count))
        return -ENOMEM;
    for (size_t row = 0; row < among_count; row++)
        add(&set, row);
    int64_t found = 0;
    for (size_t i = 0; i < count; i++) {
        int64_t position = (int64_t)*slot_of(&set, keys + i * KEY_BYTES) - 1;
        memcpy(positions + i, &position, sizeof position);
        found += position >= 0;
    }
    free(set.slots);
    return found;
}
