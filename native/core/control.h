/* The control protocol: one packet, one answer, in order.
 *
 *   message   u32 type | u32 sequence | u64 argument | payload, at most one descriptor
 *   answer    u32 type | 0x80000000 | u32 sequence | i64 result (-errno) | payload
 *
 * Types and payloads are listed in docs/CORE.md. */
#ifndef CORE_CONTROL_H
#define CORE_CONTROL_H

#include "core.h"

enum { CONTROL_BYTES_MAX = 64 << 10, CONTROL_HEADER = 16 };

/* Serve one owner, until it goes. */
void control_serve(struct core *core);

/* Handle one message with its descriptor (or -1), which it takes; any bytes are survived. Fills
 * `answer` (CONTROL_BYTES_MAX), returns its size. */
size_t control_handle(struct core *core, const uint8_t *message, size_t nbytes, int fd,
                      uint8_t *answer);

#endif
