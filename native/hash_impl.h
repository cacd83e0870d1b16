/* The body of hash_base.c, hash_avx2.c and hash_avx512.c: the same code, compiled for different
 * instruction sets. Not a header for anybody else.
 *
 * The fused loop is XXH3's long-input loop (xxhash.h, XXH3_hashLong_internal_loop) with a copy
 * between two blocks of 1 KiB, which are hashed and stored from a buffer in the L1 cache.
 * Measured on Zen 4, one core, 64 KiB to 16 MiB items from memory: 17 to 18.5 GB/s, against 18 to
 * 20 GB/s for the same stores without the hash, and 13 GB/s for memcpy().
 * REQUIRES: KVFS_OPS_NAME names the table; XXH_VECTOR is set unless the base set is meant. */
#include "hash.h"

#include <assert.h>
#include <string.h>

#define XXH_INLINE_ALL
#define XXH_STATIC_LINKING_ONLY
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wconversion"
#pragma GCC diagnostic ignored "-Wsign-conversion"
#pragma GCC diagnostic ignored "-Wshadow"
#pragma GCC diagnostic ignored "-Wcast-align"
#include "vendor/xxhash/xxhash.h"
#pragma GCC diagnostic pop

#if defined(__x86_64__)
#include <immintrin.h>
#endif

static_assert(sizeof(XXH3_state_t) <= sizeof(struct kvfs_hash_state), "state too small");
static_assert(_Alignof(XXH3_state_t) <= _Alignof(struct kvfs_hash_state), "state misaligned");

/* A cached copy waits for CACHED_BLOCKS blocks: memcpy() of 1 KiB pieces reads every line that it
 * overwrites (7.5 GB/s from memory), of 4 KiB pieces it does not (13 to 15 GB/s; plain memcpy 13),
 * and above 16 KiB the source has left the L1 cache (10 GB/s). Measured on Zen 4, one core. */
enum { LINE = 64, BLOCK = 1024, CACHED_BLOCKS = 4, SECRET = XXH_SECRET_DEFAULT_SIZE };

static_assert(BLOCK == (SECRET - XXH_STRIPE_LEN) / XXH_SECRET_CONSUME_RATE * XXH_STRIPE_LEN,
              "a block is what XXH3 hashes between two scrambles");

/* --- stores ------------------------------------------------------------------------------ */

/* Copy whole lines past the caches. REQUIRES: target aligned to LINE, nbytes a multiple of it. */
static inline void stream_lines(uint8_t *target, const uint8_t *source, size_t nbytes)
{
#if defined(__AVX512F__)
    for (size_t at = 0; at < nbytes; at += LINE)
        _mm512_stream_si512((void *)(target + at), _mm512_loadu_si512(source + at));
#elif defined(__AVX2__)
    for (size_t at = 0; at < nbytes; at += LINE) {
        __m256i low = _mm256_loadu_si256((const void *)(source + at));
        __m256i high = _mm256_loadu_si256((const void *)(source + at + 32));
        _mm256_stream_si256((void *)(target + at), low);
        _mm256_stream_si256((void *)(target + at + 32), high);
    }
#elif defined(__x86_64__)
    for (size_t at = 0; at < nbytes; at += LINE) {
        __m128i a = _mm_loadu_si128((const void *)(source + at));
        __m128i b = _mm_loadu_si128((const void *)(source + at + 16));
        __m128i c = _mm_loadu_si128((const void *)(source + at + 32));
        __m128i d = _mm_loadu_si128((const void *)(source + at + 48));
        _mm_stream_si128((void *)(target + at), a);
        _mm_stream_si128((void *)(target + at + 16), b);
        _mm_stream_si128((void *)(target + at + 32), c);
        _mm_stream_si128((void *)(target + at + 48), d);
    }
#else
    memcpy(target, source, nbytes);
#endif
}

/* Write back the lines that ordinary stores touched. REQUIRES: nbytes > 0. */
static inline void flush_lines(uint8_t *target, size_t nbytes)
{
#if defined(__x86_64__)
    uintptr_t end = (uintptr_t)target + nbytes;
    for (uintptr_t at = (uintptr_t)target & ~(uintptr_t)(LINE - 1); at < end; at += LINE)
#if defined(__CLWB__)
        _mm_clwb((void *)at);
#else
        _mm_clflush((const void *)at);
#endif
#else
    (void)target;
    (void)nbytes;
#endif
}

/* Ordinary copy of a ragged end (less than a line), then flushed. */
static inline void store_ragged(uint8_t *target, const uint8_t *source, size_t nbytes)
{
    if (nbytes == 0)
        return;
    memcpy(target, source, nbytes);
    flush_lines(target, nbytes);
}

static inline size_t bytes_to_line(const uint8_t *target, size_t nbytes)
{
    size_t head = (size_t)(-(uintptr_t)target & (LINE - 1));
    return head < nbytes ? head : nbytes;
}

static void ops_copy(void *target, const void *source, size_t nbytes)
{
    uint8_t *to = target;
    const uint8_t *from = source;
    size_t head = bytes_to_line(to, nbytes);
    size_t body = (nbytes - head) & ~(size_t)(LINE - 1);
    store_ragged(to, from, head);
    stream_lines(to + head, from + head, body);
    store_ragged(to + head + body, from + head + body, nbytes - head - body);
}

static void ops_zero(void *target, size_t nbytes)
{
    static const uint8_t zeroes[4096];
    uint8_t *to = target;
    while (nbytes > 0) {
        /* The first piece ends at a page boundary, so that all later ones are whole lines. */
        size_t piece = sizeof zeroes - ((uintptr_t)to & (sizeof zeroes - 1));
        if (piece > nbytes)
            piece = nbytes;
        ops_copy(to, zeroes, piece);
        to += piece;
        nbytes -= piece;
    }
}

/* --- hashes ------------------------------------------------------------------------------ */

static void put_digest(XXH128_hash_t hash, uint8_t digest[KVFS_DIGEST_BYTES])
{
    memcpy(digest, &hash.low64, 8);
    memcpy(digest + 8, &hash.high64, 8);
}

static uint64_t ops_hash64(const void *data, size_t nbytes, uint64_t seed)
{
    return XXH3_64bits_withSeed(data, nbytes, seed);
}

static void ops_hash128(const void *data, size_t nbytes, uint8_t digest[KVFS_DIGEST_BYTES])
{
    put_digest(XXH3_128bits(data, nbytes), digest);
}

static void ops_reset(struct kvfs_hash_state *state)
{
    (void)XXH3_128bits_reset((XXH3_state_t *)(void *)state);
}

static void ops_update(struct kvfs_hash_state *state, const void *data, size_t nbytes)
{
    (void)XXH3_128bits_update((XXH3_state_t *)(void *)state, data, nbytes);
}

static void ops_finish(const struct kvfs_hash_state *state, uint8_t digest[KVFS_DIGEST_BYTES])
{
    put_digest(XXH3_128bits_digest((const XXH3_state_t *)(const void *)state), digest);
}

/* --- fused ------------------------------------------------------------------------------- */

/* One item on its way: each piece of the source is loaded once, into `step`, and both hashed and
 * stored from there. So the digest is of what was stored, also if somebody changes the source
 * meanwhile. In front of a piece lies the last line of the one before, which the last stripe of
 * the hash and a target that is not aligned reach back to. */
struct step {
    _Alignas(LINE) uint8_t kept[LINE];
    uint8_t data[CACHED_BLOCKS * BLOCK];
};

/* Hash the whole blocks of a piece, and at the end of the item what is left. */
static inline void hash_piece(xxh_u64 *acc, const uint8_t *data, size_t nbytes, size_t blocks,
                              int is_last)
{
    for (size_t block = 0; block < blocks; block++) {
        XXH3_accumulate(acc, data + block * BLOCK, XXH3_kSecret, BLOCK / XXH_STRIPE_LEN,
                        XXH3_accumulate_512);
        XXH3_scrambleAcc(acc, XXH3_kSecret + SECRET - XXH_STRIPE_LEN);
    }
    if (!is_last)
        return;
    size_t stripes = (nbytes - 1 - BLOCK * blocks) / XXH_STRIPE_LEN;
    XXH3_accumulate(acc, data + blocks * BLOCK, XXH3_kSecret, stripes, XXH3_accumulate_512);
    XXH3_accumulate_512(acc, data + nbytes - XXH_STRIPE_LEN,
                        XXH3_kSecret + SECRET - XXH_STRIPE_LEN - XXH_SECRET_LASTACC_START);
}

static void fuse_short(uint8_t *target, const uint8_t *source, size_t nbytes,
                       uint8_t digest[KVFS_DIGEST_BYTES], int cached)
{
    uint8_t copy[XXH3_MIDSIZE_MAX] = {0};
    if (nbytes > 0) /* an empty item may lie at address 0 */
        memcpy(copy, source, nbytes);
    ops_hash128(copy, nbytes, digest);
    if (!cached)
        ops_copy(target, copy, nbytes);
    else if (nbytes > 0)
        memcpy(target, copy, nbytes);
}

static inline void fused(uint8_t *target, const uint8_t *source, size_t nbytes,
                         uint8_t digest[KVFS_DIGEST_BYTES], int cached)
{
    if (nbytes <= XXH3_MIDSIZE_MAX) {
        fuse_short(target, source, nbytes, digest, cached);
        return;
    }
    const size_t whole = cached ? CACHED_BLOCKS * BLOCK : BLOCK;
    XXH_ALIGN(XXH_ACC_ALIGN) xxh_u64 acc[XXH_ACC_NB] = XXH3_INIT_ACC;
    struct step step;
    size_t blocks = (nbytes - 1) / BLOCK; /* the last one, whole or not, is hashed apart */
    size_t stored = 0;                    /* invariant (streamed): target + stored is a line's */
    for (size_t start = 0; start < nbytes; start += whole) {
        size_t piece = nbytes - start < whole ? nbytes - start : whole;
        int is_last = start + piece == nbytes;
        if (start > 0)
            memcpy(step.kept, step.data + whole - LINE, LINE);
        if (piece == whole)
            memcpy(step.data, source + start, whole);
        else
            memcpy(step.data, source + start, piece);
        size_t left = blocks - start / BLOCK;
        hash_piece(acc, step.data, piece, left < piece / BLOCK ? left : piece / BLOCK, is_last);
        if (cached) {
            memcpy(target + start, step.data, piece);
            continue;
        }
        if (start == 0)
            store_ragged(target, step.data, stored = bytes_to_line(target, nbytes));
        const uint8_t *from = (const uint8_t *)&step + LINE + stored - start;
        size_t lines = (start + piece - stored) & ~(size_t)(LINE - 1);
        stream_lines(target + stored, from, lines);
        stored += lines;
        if (is_last)
            store_ragged(target + stored, from + lines, nbytes - stored);
    }

    XXH128_hash_t hash;
    hash.low64 = XXH3_mergeAccs(acc, XXH3_kSecret + XXH_SECRET_MERGEACCS_START,
                                (xxh_u64)nbytes * XXH_PRIME64_1);
    hash.high64 = XXH3_mergeAccs(
        acc, XXH3_kSecret + SECRET - sizeof acc - XXH_SECRET_MERGEACCS_START,
        ~((xxh_u64)nbytes * XXH_PRIME64_2));
    put_digest(hash, digest);
}

static void ops_copy_hash(void *target, const void *source, size_t nbytes,
                          uint8_t digest[KVFS_DIGEST_BYTES])
{
    fused(target, source, nbytes, digest, 0);
}

static void ops_copy_hash_cached(void *target, const void *source, size_t nbytes,
                                 uint8_t digest[KVFS_DIGEST_BYTES])
{
    fused(target, source, nbytes, digest, 1);
}

extern const struct kvfs_hash_ops KVFS_OPS_NAME;
const struct kvfs_hash_ops KVFS_OPS_NAME = {
    .hash64 = ops_hash64,
    .hash128 = ops_hash128,
    .reset = ops_reset,
    .update = ops_update,
    .finish = ops_finish,
    .copy = ops_copy,
    .copy_hash = ops_copy_hash,
    .copy_hash_cached = ops_copy_hash_cached,
    .zero = ops_zero,
};
