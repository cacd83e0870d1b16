/* The shared header of a table and where slots lie. Internal to the table. */
#ifndef KVFS_TABLE_LAYOUT_H
#define KVFS_TABLE_LAYOUT_H

#include "slot.h"
#include "table.h"

#include <assert.h>

enum {
    HEADER_BYTES = 4096,
    TABLE_VERSION = 1,
    SLOTS_MIN = 16,
    /* No record lies further from its home than this. A chain this long cannot come about by
     * chance below the load limit (the longest expected at 2^40 slots and load 3/4 is 750), so it
     * only bounds what a hostile table can cost, and what many copies of one key may. */
    PROBES_MAX = 1024,
};

#define TABLE_MAGIC UINT64_C(0x315844495346564b) /* "KVFSIDX1" */

struct kvfs_table_header {
    /* Written once, before the descriptor can be seen. */
    uint64_t magic;
    uint32_t version;
    uint32_t record_bytes;
    uint64_t slots;
    uint64_t capacity;
    uint64_t seed;
    uint8_t reserved[24];
    /* Written by the owner, read by all; each on its own terms (relaxed). */
    _Atomic uint64_t count;
    _Atomic uint64_t tombstones;
    _Atomic uint64_t is_superseded;
    uint8_t reserved2[40];
    _Atomic uint64_t ranks[KVFS_RANKS / 8];
};

static_assert(sizeof(struct kvfs_record) == KVFS_RECORD_BYTES, "shared with python");
static_assert(sizeof(uint64_t[SLOT_WORDS]) == KVFS_RECORD_BYTES, "a slot is a record");
static_assert(offsetof(struct kvfs_table_header, count) == 64, "shared between processes");
static_assert(offsetof(struct kvfs_table_header, ranks) == 128, "shared between processes");
static_assert(sizeof(struct kvfs_table_header) <= HEADER_BYTES, "shared between processes");
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "words are laid out little-endian");
static_assert(ATOMIC_LLONG_LOCK_FREE == 2, "a lock would live in one process only");

static inline _Atomic uint64_t *table_slot(const struct kvfs_table *table, uint64_t index)
{
    return table->slots + (index & table->mask) * SLOT_WORDS;
}

/* Bound of a probe sequence. */
static inline uint64_t table_probes(const struct kvfs_table *table)
{
    return table->mask < PROBES_MAX ? table->mask + 1 : PROBES_MAX;
}

/* Waits that a batch may spend on busy slots. */
extern const unsigned kvfs_table_patience;

/* Home of a key. */
uint64_t kvfs_table_hash(const struct kvfs_table *table, const uint64_t key[4]);

/* Mapping and geometry, shared by create and attach. */
static inline size_t table_bytes(uint64_t slots)
{
    return HEADER_BYTES + (size_t)slots * KVFS_RECORD_BYTES;
}

#endif
