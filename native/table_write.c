/* Changes to a table, by its one writer. */
#include "table.h"
#include "table_layout.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

/* Records whose slots are fetched before the first is looked at. */
enum { AHEAD = 16 };

/* Where a (key, device) lies, or where it may go. */
struct place {
    _Atomic uint64_t *match; /* NULL: not in the table */
    _Atomic uint64_t *free;  /* first tombstone, else the empty slot; NULL: chain too long */
    uint64_t index;          /* of match */
    bool is_free_tombstone;
    bool has_copies; /* other devices hold the key; only known without a match */
};

static int begin(struct kvfs_table *table)
{
    if (!table->is_writable || table->owner != getpid())
        return -EROFS;
    pthread_mutex_lock(&table->lock);
    if (!kvfs_table_is_superseded(table))
        return 0;
    pthread_mutex_unlock(&table->lock);
    return -ESTALE;
}

static void add_to(_Atomic uint64_t *counter, int64_t change)
{
    /* One writer: a load and a store are enough, and readers see no in-between. */
    uint64_t value = atomic_load_explicit(counter, memory_order_relaxed);
    atomic_store_explicit(counter, value + (uint64_t)change, memory_order_relaxed);
}

static struct place locate(const struct kvfs_table *table, const uint64_t record[SLOT_WORDS])
{
    struct place place = {0};
    uint64_t home = kvfs_table_hash(table, record);
    uint64_t probes = table_probes(table);
    uint64_t words[SLOT_WORDS];
    for (uint64_t probe = 0; probe < probes; probe++) {
        _Atomic uint64_t *slot = table_slot(table, home + probe);
        slot_peek(slot, words);
        if (slot_is_live(words)) {
            if (!slot_has_key(words, record))
                continue;
            place.has_copies = true;
            if (slot_device(words) != slot_device(record))
                continue;
            place.match = slot;
            place.index = (home + probe) & table->mask;
            return place;
        }
        bool is_tombstone = slot_is_tombstone(words);
        if (place.free == NULL) {
            place.free = slot;
            place.is_free_tombstone = is_tombstone;
        }
        if (!is_tombstone)
            break;
    }
    return place;
}

static void prefetch(const struct kvfs_table *table, const uint8_t *records, size_t count)
{
    for (size_t i = 0; i < count && i < AHEAD; i++) {
        uint64_t key[4];
        memcpy(key, records + i * KVFS_RECORD_BYTES, sizeof key);
        __builtin_prefetch((const void *)table_slot(table, kvfs_table_hash(table, key)), 1);
    }
}

/* Whether one more record may go into the slot found for it. Tombstones count: they make chains
 * as long as records do. */
static bool has_room(const struct kvfs_table *table, const struct place *place)
{
    uint64_t count = atomic_load_explicit(&table->header->count, memory_order_relaxed);
    uint64_t dead = atomic_load_explicit(&table->header->tombstones, memory_order_relaxed);
    if (place->free == NULL || count >= table->capacity)
        return false;
    return place->is_free_tombstone || count + dead < table->capacity + table->capacity / 2;
}

/* Tell readers of any copy of the key to look for the others. */
static void mark_copies(const struct kvfs_table *table, const uint64_t record[SLOT_WORDS])
{
    uint64_t home = kvfs_table_hash(table, record);
    uint64_t probes = table_probes(table);
    uint64_t words[SLOT_WORDS];
    for (uint64_t probe = 0; probe < probes; probe++) {
        _Atomic uint64_t *slot = table_slot(table, home + probe);
        slot_peek(slot, words);
        if (slot_is_empty(words))
            return;
        if (!slot_is_live(words) || !slot_has_key(words, record) || slot_has_copies(words))
            continue;
        words[7] |= COPIES_BIT;
        slot_write(slot, words);
    }
}

static bool insert_one(struct kvfs_table *table, const uint8_t *record, uint8_t *replaced)
{
    uint64_t words[SLOT_WORDS], before[SLOT_WORDS] = {0};
    slot_from_record(words, record);
    /* Checked on the copy: the caller's memory may change under us, and a slot of length 0 would
     * count as a record while being none. */
    if (!slot_is_live(words))
        return false;
    struct place place = locate(table, words);
    if (place.match != NULL) {
        slot_peek(place.match, before);
        words[7] |= before[7] & COPIES_BIT;
        slot_write(place.match, words);
    } else if (has_room(table, &place)) {
        /* The bit goes with the record from the start: a reader that meets the new copy first
         * must still find the older ones. */
        if (place.has_copies)
            words[7] |= COPIES_BIT;
        slot_write(place.free, words);
        add_to(&table->header->count, 1);
        if (place.is_free_tombstone)
            add_to(&table->header->tombstones, -1);
        if (place.has_copies)
            mark_copies(table, words);
    } else {
        return false;
    }
    if (replaced != NULL)
        slot_to_record(replaced, before);
    return true;
}

int64_t kvfs_table_insert(struct kvfs_table *table, const uint8_t *records, size_t count,
                          uint8_t *replaced)
{
    int status = begin(table);
    if (status != 0)
        return status;
    size_t done = 0;
    for (; done < count; done++) {
        const uint8_t *record = records + done * KVFS_RECORD_BYTES;
        if (done % AHEAD == 0)
            prefetch(table, record, count - done);
        if (!insert_one(table, record,
                        replaced == NULL ? NULL : replaced + done * KVFS_RECORD_BYTES))
            break;
    }
    pthread_mutex_unlock(&table->lock);
    if (replaced != NULL)
        memset(replaced + done * KVFS_RECORD_BYTES, 0, (count - done) * KVFS_RECORD_BYTES);
    return (int64_t)done;
}

/* Find the slot of a record that also has the same segment and generation. */
static struct place locate_exact(const struct kvfs_table *table, const uint8_t *record)
{
    uint64_t wanted[SLOT_WORDS], words[SLOT_WORDS];
    slot_from_record(wanted, record);
    struct place place = locate(table, wanted);
    if (place.match == NULL)
        return place;
    slot_peek(place.match, words);
    bool is_same_segment = words[4] >> 32 == wanted[4] >> 32;
    bool is_same_generation = (uint32_t)words[5] == (uint32_t)wanted[5];
    if (!is_same_segment || !is_same_generation)
        place.match = NULL;
    return place;
}

/* Turn the tombstones that end a chain into empty slots: nothing lies behind them. No reader can
 * lose a record by it, for a record's chain has no empty slot before it, now or at any time since
 * it was inserted. */
static void trim_chain(struct kvfs_table *table, uint64_t index)
{
    static const uint64_t empty[SLOT_WORDS];
    uint64_t words[SLOT_WORDS];
    slot_peek(table_slot(table, index + 1), words);
    if (!slot_is_empty(words))
        return;
    for (uint64_t i = 0; i <= table->mask; i++) {
        _Atomic uint64_t *slot = table_slot(table, index - i);
        slot_peek(slot, words);
        if (!slot_is_tombstone(words))
            return;
        slot_write(slot, empty);
        add_to(&table->header->tombstones, -1);
    }
}

int64_t kvfs_table_remove(struct kvfs_table *table, const uint8_t *records, size_t count)
{
    static const uint64_t tombstone[SLOT_WORDS] = {[4] = TOMBSTONE_WORD};
    int status = begin(table);
    if (status != 0)
        return status;
    int64_t removed = 0;
    for (size_t i = 0; i < count; i++) {
        const uint8_t *record = records + i * KVFS_RECORD_BYTES;
        if (i % AHEAD == 0)
            prefetch(table, record, count - i);
        struct place place = locate_exact(table, record);
        if (place.match == NULL)
            continue;
        slot_write(place.match, tombstone);
        add_to(&table->header->count, -1);
        add_to(&table->header->tombstones, 1);
        trim_chain(table, place.index);
        removed++;
    }
    pthread_mutex_unlock(&table->lock);
    return removed;
}

int64_t kvfs_table_set_flags(struct kvfs_table *table, const uint8_t *records, size_t count,
                             uint16_t flags)
{
    int status = begin(table);
    if (status != 0)
        return status;
    int64_t matched = 0;
    for (size_t i = 0; i < count; i++) {
        const uint8_t *record = records + i * KVFS_RECORD_BYTES;
        if (i % AHEAD == 0)
            prefetch(table, record, count - i);
        struct place place = locate_exact(table, record);
        if (place.match == NULL)
            continue;
        uint64_t words[SLOT_WORDS];
        slot_peek(place.match, words);
        words[4] |= (uint64_t)flags << 16;
        slot_write(place.match, words);
        matched++;
    }
    pthread_mutex_unlock(&table->lock);
    return matched;
}
