/* The part of the range registry that the signal handler calls; see guard.h for the rest. */
#ifndef KVFS_RANGE_H
#define KVFS_RANGE_H

#include <stdbool.h>
#include <stdint.h>

/* Back the page at address with zeroes if it lies in a registered range, and note the offset.
 * Returns false if it lies in none or cannot be mapped. Async-signal-safe; changes errno. */
bool kvfs_range_repair(uintptr_t address);

#endif
