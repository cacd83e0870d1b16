#include "write_back.h"

#include "guard.h"
#include "hash.h"
#include "status.h"

#include <stdatomic.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

enum { LINE = 64, PAGE = 4096 };

struct store {
    void *target;
    const void *source;
    size_t nbytes;
    enum kvfs_write_back way;
};

#if defined(__x86_64__)
enum { LEAF_EXTENDED = 7, BIT_CLFLUSHOPT = 1 << 23, BIT_CLWB = 1 << 24 };

enum kvfs_write_back kvfs_write_back_best(void)
{
    unsigned eax, ebx = 0, ecx, edx;
    (void)__get_cpuid_count(LEAF_EXTENDED, 0, &eax, &ebx, &ecx, &edx);
    if (ebx & BIT_CLWB)
        return KVFS_WRITE_BACK_CLWB;
    return ebx & BIT_CLFLUSHOPT ? KVFS_WRITE_BACK_CLFLUSHOPT : KVFS_WRITE_BACK_CLFLUSH;
}

__attribute__((target("clwb"))) static void line_clwb(uintptr_t line)
{
    _mm_clwb((void *)line);
}

__attribute__((target("clflushopt"))) static void line_clflushopt(uintptr_t line)
{
    _mm_clflushopt((void *)line);
}

static void write_back(const struct store *store)
{
    uintptr_t end = (uintptr_t)store->target + store->nbytes;
    for (uintptr_t at = (uintptr_t)store->target & ~(uintptr_t)(LINE - 1); at < end; at += LINE) {
        if (store->way == KVFS_WRITE_BACK_CLWB)
            line_clwb(at);
        else if (store->way == KVFS_WRITE_BACK_CLFLUSHOPT)
            line_clflushopt(at);
        else if (store->way == KVFS_WRITE_BACK_CLFLUSH)
            _mm_clflush((const void *)at);
    }
}
#else
enum kvfs_write_back kvfs_write_back_best(void)
{
    return KVFS_WRITE_BACK_FENCE;
}

static void write_back(const struct store *store)
{
    (void)store;
}
#endif

const char *kvfs_write_back_name(enum kvfs_write_back way)
{
    static const char *const names[] = {"fence", "clflush", "clflushopt", "clwb"};
    return names[way];
}

static void store_body(void *argument)
{
    const struct store *store = argument;
    memcpy(store->target, store->source, store->nbytes);
    write_back(store);
}

int32_t kvfs_store(void *target, const void *source, size_t nbytes, enum kvfs_write_back way)
{
    struct store store = {target, source, nbytes, way};
    bool is_done = nbytes == 0 || kvfs_guard_run(store_body, &store);
    kvfs_store_fence();
    return is_done ? KVFS_DONE : KVFS_FAULT;
}

static void touch_body(void *argument)
{
    const struct store *range = argument;
    uintptr_t end = (uintptr_t)range->target + range->nbytes;
    uintptr_t at = (uintptr_t)range->target;
    for (; at < end; at = (at & ~(uintptr_t)(PAGE - 1)) + PAGE)
        (void)atomic_fetch_or((_Atomic volatile uint8_t *)at, 0);
}

int32_t kvfs_touch(void *target, size_t nbytes)
{
    struct store range = {target, NULL, nbytes, KVFS_WRITE_BACK_FENCE};
    return kvfs_guard_run(touch_body, &range) ? KVFS_DONE : KVFS_FAULT;
}
