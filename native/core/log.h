/* Lines on standard error, and the clock. Thread-safety: any thread. */
#ifndef CORE_LOG_H
#define CORE_LOG_H

#include <stdatomic.h>
#include <stdint.h>

/* Write one line "kvfs-core: ...", in one system call. */
__attribute__((format(printf, 1, 2))) void log_line(const char *format, ...);

/* At most one line per second; the next one tells how many were left out. */
struct log_limit {
    _Atomic(int64_t) next_ns;
    atomic_uint skipped;
};

__attribute__((format(printf, 2, 3))) void log_limited(struct log_limit *limit, const char *format,
                                                       ...);

/* Monotonic. */
int64_t now_ns(void);

void sleep_ms(int64_t milliseconds);

#define NS_PER_MS INT64_C(1000000)
#define NS_PER_S INT64_C(1000000000)

#endif
