/* The index: an open-addressing hash table of 64-byte records in a memfd.
 *
 * One process writes (kvfs_table_create, kvfs_table_grow), any number read (kvfs_table_attach, or
 * the writer's own threads). Each slot is a sequence lock: the sequence is odd while the slot is
 * written. Linear probing; a removed record leaves a tombstone, nothing is ever shifted, so a
 * record that stays in the table is always found. A reader that cannot get a stable copy of a slot
 * waits for it, about 10 ms per batch in all, and then passes over it.
 *
 * The header and slots are shared with processes that may misbehave: readers check the geometry
 * once against the size of the sealed file, and never index, loop or copy by anything they read
 * later. Arrays of keys are uint8[count][32], of records uint8[count][64], of any alignment.
 *
 * Thread-safety: create, attach, grow and destroy belong to one thread. Reading functions
 * (const) run on any thread at any time. Writing functions are serialised by an inner mutex.
 * Errors are -errno. */
#ifndef KVFS_TABLE_H
#define KVFS_TABLE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <pthread.h>
#include <sys/types.h>

enum {
    KVFS_KEY_BYTES = 32,
    KVFS_RECORD_BYTES = 64,
    KVFS_RANKS = 256,
    KVFS_ANY_DEVICE = -1,
};

/* Capacity above which create refuses (-EINVAL): 2^33 records are a table of 1 TiB. */
#define KVFS_CAPACITY_MAX ((uint64_t)1 << 33)

/* As it lies in memory and crosses the C boundary; little-endian. A record of length 0 is no
 * record: it means a miss in results and is refused by kvfs_table_insert. */
struct kvfs_record {
    uint8_t key[KVFS_KEY_BYTES];
    uint16_t device;
    uint16_t flags;
    uint32_t segment;
    uint32_t generation;
    uint32_t page;
    uint32_t length;
    uint32_t tokens;
    uint32_t entry;
    uint32_t sequence;
};

struct kvfs_table_header;

struct kvfs_table {
    struct kvfs_table_header *header;
    _Atomic uint64_t *slots; /* 8 words each */
    size_t mapped_bytes;
    uint64_t mask;     /* slots - 1; a private copy, as is the seed */
    uint64_t capacity; /* records */
    uint64_t seed;
    /* A byte per device; the header's, or own_ranks after kvfs_table_set_ranks on a reader. */
    _Atomic(const _Atomic uint64_t *) ranks;
    _Atomic uint64_t own_ranks[KVFS_RANKS / 8];
    /* A change that was waited for in vain, so that it is not again: word 7 and slot, mixed. */
    _Atomic uint64_t stuck_change;
    unsigned patience; /* waits per batch; tests raise it */
    int fd;            /* owned */
    bool is_writable;
    pid_t owner; /* a forked child must not write */
    pthread_mutex_t lock;
};

/* Make an empty table for at least capacity records, in a memfd that can neither be resized nor
 * mapped writable again. */
int kvfs_table_create(struct kvfs_table *table, uint64_t capacity, uint64_t seed);

/* Map the table behind a descriptor read-only; the descriptor is duplicated.
 * Returns 0, -errno, or -EBADMSG with a static text in *reason if it is not a sound table. */
int kvfs_table_attach(struct kvfs_table *table, int fd, const char **reason);

void kvfs_table_destroy(struct kvfs_table *table);

uint64_t kvfs_table_count(const struct kvfs_table *table);
bool kvfs_table_is_superseded(const struct kvfs_table *table);

/* Set the rank of devices 0 .. count - 1; others get the worst, 255. On the writer this is for
 * all readers, on a reader for this handle. REQUIRES: count <= KVFS_RANKS. */
void kvfs_table_set_ranks(struct kvfs_table *table, const uint8_t *ranks, size_t count);

/* Look up keys, preferring the device of the lowest rank (then of the lowest number), or only on
 * one device. Misses become zeroes. Returns the number of hits. */
size_t kvfs_table_lookup(const struct kvfs_table *table, const uint8_t *keys, size_t count,
                         int device, uint8_t *records);

/* How many leading keys are present. */
size_t kvfs_table_match_prefix(const struct kvfs_table *table, const uint8_t *keys, size_t count);

/* Copy records in table order, at most room; returns how many there are in all. */
size_t kvfs_table_snapshot(struct kvfs_table *table, uint8_t *records, size_t room);

/* The functions below write. All return -EROFS on a reader or in a forked child, -ESTALE once
 * superseded. */

/* Insert or replace; returns how many were done, fewer than count if the table is full. replaced
 * (or NULL) receives the previous record of each (key, device), zeroes if none.
 * REQUIRES: no record has length 0. */
int64_t kvfs_table_insert(struct kvfs_table *table, const uint8_t *records, size_t count,
                          uint8_t *replaced);

/* Remove the records that match in key, device, segment and generation; returns how many. */
int64_t kvfs_table_remove(struct kvfs_table *table, const uint8_t *records, size_t count);

/* OR flags into matching records; returns how many matched. */
int64_t kvfs_table_set_flags(struct kvfs_table *table, const uint8_t *records, size_t count,
                             uint16_t flags);

/* Copy all into a fresh table (ranks, seed too) and mark the old one superseded.
 * Returns 0, -ENOSPC if capacity is below the count, or -errno; the old one is unchanged then. */
int kvfs_table_grow(struct kvfs_table *table, uint64_t capacity, struct kvfs_table *fresh);

/* Mark superseded without a successor: what it says is no longer true. */
int kvfs_table_retire(struct kvfs_table *table);

#endif
