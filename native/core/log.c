#include "log.h"

#include <stdarg.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

static const char prefix[] = "kvfs-core: ";

static void write_line(unsigned skipped, const char *format, va_list arguments)
{
    char line[1024];
    int length = snprintf(line, sizeof line, "%s", prefix);
    int added = vsnprintf(line + length, sizeof line - 64, format, arguments);
    if (added < 0)
        return;
    length += added < (int)sizeof line - 80 ? added : (int)sizeof line - 80;
    if (skipped > 0)
        length += snprintf(line + length, sizeof line - (size_t)length, " (%u more)", skipped);
    line[length++] = '\n';
    /* Nobody to tell if standard error is gone. */
    ssize_t ignored = write(STDERR_FILENO, line, (size_t)length);
    (void)ignored;
}

void log_line(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    write_line(0, format, arguments);
    va_end(arguments);
}

void log_limited(struct log_limit *limit, const char *format, ...)
{
    int64_t now = now_ns();
    int64_t next = atomic_load(&limit->next_ns);
    if (now < next || !atomic_compare_exchange_strong(&limit->next_ns, &next, now + NS_PER_S)) {
        atomic_fetch_add(&limit->skipped, 1);
        return;
    }
    va_list arguments;
    va_start(arguments, format);
    write_line(atomic_exchange(&limit->skipped, 0), format, arguments);
    va_end(arguments);
}

int64_t now_ns(void)
{
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * NS_PER_S + now.tv_nsec;
}

void sleep_ms(int64_t milliseconds)
{
    struct timespec wanted = {
        .tv_sec = milliseconds / 1000,
        .tv_nsec = milliseconds % 1000 * NS_PER_MS,
    };
    (void)nanosleep(&wanted, NULL);
}
