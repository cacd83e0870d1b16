/* One slot of the table: eight 64-bit words under a sequence lock. Internal to the table.
 *
 * word 0..3  key
 * word 4     device u16 | flags u16 | segment u32      all ones in a tombstone
 * word 5     generation u32 | page u32
 * word 6     length u32 | tokens u32                   length 0: no record here
 * word 7     entry u32 | sequence u32                  bit 0: being written; bit 1: key has copies
 *
 * The low half of word 6 being 0 makes a slot empty or a tombstone, so that the sequence never
 * has to go back: a reader that sees one value twice has seen one version.
 *
 * The copies bit says that other slots may hold the same key for another device: a reader that
 * finds a key without it need not go on to the end of the chain. It is set on every copy when a
 * second one is inserted, and stays; a needless one costs a few probes.
 *
 * Orders: the writer makes the sequence odd, then (release fence) stores the words, then stores
 * word 7 with release. The reader loads word 7 with acquire, the words, then (acquire fence)
 * word 7 again. All accesses are atomic: torn reads are discarded, not undefined. */
#ifndef KVFS_SLOT_H
#define KVFS_SLOT_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

enum { SLOT_WORDS = 8 };

/* Tries before a slot counts as busy: far more than a change of 64 bytes takes. */
enum { READ_SPINS = 64 };

#define TOMBSTONE_WORD UINT64_MAX

/* Bits of word 7, and what one change adds to it. */
#define WRITING_BIT ((uint64_t)1 << 32)
#define COPIES_BIT ((uint64_t)2 << 32)
#define SEQUENCE_STEP ((uint64_t)4 << 32)

static inline uint32_t slot_length(const uint64_t words[SLOT_WORDS])
{
    return (uint32_t)words[6];
}

static inline uint16_t slot_device(const uint64_t words[SLOT_WORDS])
{
    return (uint16_t)words[4];
}

static inline bool slot_is_live(const uint64_t words[SLOT_WORDS])
{
    return slot_length(words) != 0;
}

static inline bool slot_is_tombstone(const uint64_t words[SLOT_WORDS])
{
    return slot_length(words) == 0 && words[4] == TOMBSTONE_WORD;
}

static inline bool slot_is_empty(const uint64_t words[SLOT_WORDS])
{
    return slot_length(words) == 0 && words[4] != TOMBSTONE_WORD;
}

static inline bool slot_has_copies(const uint64_t words[SLOT_WORDS])
{
    return (words[7] & COPIES_BIT) != 0;
}

static inline bool slot_has_key(const uint64_t words[SLOT_WORDS], const uint64_t key[4])
{
    return ((words[0] ^ key[0]) | (words[1] ^ key[1]) | (words[2] ^ key[2]) |
            (words[3] ^ key[3])) == 0;
}

static inline void slot_pause(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* Copy a slot; returns false if it did not hold still within so many tries; word 7 is then what
 * was seen last. */
static inline bool slot_read(const _Atomic uint64_t *slot, uint64_t words[SLOT_WORDS],
                             unsigned tries)
{
    while (tries-- > 0) {
        words[7] = atomic_load_explicit(&slot[7], memory_order_acquire);
        if ((words[7] & WRITING_BIT) == 0) {
            for (int i = 0; i < 7; i++)
                words[i] = atomic_load_explicit(&slot[i], memory_order_relaxed);
            atomic_thread_fence(memory_order_acquire);
            if (atomic_load_explicit(&slot[7], memory_order_relaxed) == words[7])
                return true;
        }
        slot_pause();
    }
    return false;
}

/* Copy a slot as its only writer. */
static inline void slot_peek(const _Atomic uint64_t *slot, uint64_t words[SLOT_WORDS])
{
    for (int i = 0; i < SLOT_WORDS; i++)
        words[i] = atomic_load_explicit(&slot[i], memory_order_relaxed);
}

/* Replace a slot; of word 7 only the entry and the copies bit are taken from words.
 * REQUIRES: the writer's mutex is held. */
static inline void slot_write(_Atomic uint64_t *slot, const uint64_t words[SLOT_WORDS])
{
    uint64_t before = atomic_load_explicit(&slot[7], memory_order_relaxed);
    uint64_t sequence = before & ~(UINT32_MAX | WRITING_BIT | COPIES_BIT);
    uint64_t after = (sequence + SEQUENCE_STEP) | (words[7] & (UINT32_MAX | COPIES_BIT));
    atomic_store_explicit(&slot[7], before | WRITING_BIT, memory_order_relaxed);
    atomic_thread_fence(memory_order_release);
    for (int i = 0; i < 7; i++)
        atomic_store_explicit(&slot[i], words[i], memory_order_relaxed);
    atomic_store_explicit(&slot[7], after, memory_order_release);
}

/* Records in arrays have the layout of a slot with sequence 0. */
static inline void slot_from_record(uint64_t words[SLOT_WORDS], const uint8_t *record)
{
    memcpy(words, record, SLOT_WORDS * sizeof *words);
    words[7] &= UINT32_MAX;
}

static inline void slot_to_record(uint8_t *record, const uint64_t words[SLOT_WORDS])
{
    uint64_t out[SLOT_WORDS];
    memcpy(out, words, sizeof out);
    out[7] &= UINT32_MAX;
    memcpy(record, out, sizeof out);
}

#endif
