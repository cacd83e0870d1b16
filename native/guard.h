/* SIGBUS: a poisoned or truncated page costs one item or one zero page, not the process.
 *
 * One handler serves the process. In this order it
 *   1. leaves the guarded body that runs on the faulting thread (kvfs_guard_run);
 *   2. backs the page with zeroes if it lies in a registered range, and notes the offset;
 *   3. hands the signal to whoever handled SIGBUS before, by default: the process dies.
 *
 * Thread-safety: all functions may be called from any thread, none from a signal handler. */
#ifndef KVFS_GUARD_H
#define KVFS_GUARD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { KVFS_FAULTS_MAX = 64 };

/* Install the handler, or put it back if somebody replaced it (whom it then hands on to).
 * Returns 0 or -errno. Cost: one system call. */
int kvfs_guard_install(void);

/* Run body(argument); returns false if it was left because of a SIGBUS.
 * REQUIRES: the handler is installed. The body takes no lock, allocates nothing, does not touch
 * Python; it may be left at any load or store. Bodies may nest. */
bool kvfs_guard_run(void (*body)(void *), void *argument);

struct kvfs_range;

/* Register [start, start + nbytes). A fault inside maps anonymous zeroes over one page of 4 KiB,
 * or over one unit of `align` bytes where the kernel cannot split the mapping.
 * Returns NULL when out of memory. REQUIRES: the caller owns the address range until removal. */
struct kvfs_range *kvfs_range_add(uintptr_t start, size_t nbytes, size_t align);

/* Forget a range. On return no handler works on it any more: unmap it after this. */
void kvfs_range_remove(struct kvfs_range *range);

/* How many faults there were. */
uint32_t kvfs_range_faults(const struct kvfs_range *range);

/* Copy the offsets of the first faults, oldest first, at most KVFS_FAULTS_MAX; returns how many.
 * Threads that fault on one page at a time note it twice. */
size_t kvfs_range_offsets(const struct kvfs_range *range, uint64_t offsets[KVFS_FAULTS_MAX]);

#endif
