/* XXH3 and streaming copies, one implementation per instruction set.
 *
 * Digests are XXH3-128, unseeded: low 64 bits little-endian, then high 64 bits little-endian.
 * Copies use non-temporal stores: they are ordered only by kvfs_store_fence(), and after it they
 * are in the persistence domain of a DAX mapping (ragged first and last lines are flushed).
 *
 * Thread-safety: everything here is pure. A fault in a source or target is a SIGBUS: callers
 * that cannot trust the memory run these functions inside kvfs_guard_run().
 * REQUIRES: source and target do not overlap. */
#ifndef KVFS_HASH_H
#define KVFS_HASH_H

#include <stddef.h>
#include <stdint.h>

enum { KVFS_DIGEST_BYTES = 16 };

/* Opaque streaming state of XXH3-128; lives on the caller's stack. */
struct kvfs_hash_state {
    _Alignas(64) unsigned char opaque[640];
};

struct kvfs_hash_ops {
    uint64_t (*hash64)(const void *data, size_t nbytes, uint64_t seed);
    void (*hash128)(const void *data, size_t nbytes, uint8_t digest[KVFS_DIGEST_BYTES]);
    void (*reset)(struct kvfs_hash_state *state);
    void (*update)(struct kvfs_hash_state *state, const void *data, size_t nbytes);
    void (*finish)(const struct kvfs_hash_state *state, uint8_t digest[KVFS_DIGEST_BYTES]);
    /* Copy, non-temporal. */
    void (*copy)(void *target, const void *source, size_t nbytes);
    /* Copy, non-temporal, and hash: every source byte is loaded from memory once. */
    void (*copy_hash)(void *target, const void *source, size_t nbytes,
                      uint8_t digest[KVFS_DIGEST_BYTES]);
    /* The same with ordinary stores, for targets that are read soon. */
    void (*copy_hash_cached)(void *target, const void *source, size_t nbytes,
                             uint8_t digest[KVFS_DIGEST_BYTES]);
    /* Write zero bytes, non-temporal. */
    void (*zero)(void *target, size_t nbytes);
};

/* The implementation for this CPU. */
const struct kvfs_hash_ops *kvfs_hash_ops(void);

/* Order all earlier non-temporal stores and flushes before anything later. */
void kvfs_store_fence(void);

#endif
