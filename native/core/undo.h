/* Taking back what the owner did for a request that the kernel no longer waits for: handles are
 * released, lookups forgotten, by requests of the core's own. */
#ifndef CORE_UNDO_H
#define CORE_UNDO_H

#include "core.h"

/* REQUIRES: a successful reply, header included. */
void undo_reply(struct core *core, const struct pending_request *request, const uint8_t *bytes,
                size_t nbytes);

#endif
