/* The INIT exchange: kept, shown to the owner, and its reply completed by what the core can do. */
#ifndef CORE_INIT_H
#define CORE_INIT_H

#include "reader.h"

int init_create(struct init *init);
void init_destroy(struct init *init);

/* The kernel's INIT: keep it. Returns whether it is answered (a malformed one, by EIO). */
bool init_receive(struct core *core, struct reader *reader, const struct request *request);

/* Wait until it has come, at most so long. */
bool init_wait(struct init *init, int64_t wait_ms);

/* Copy the INIT for a further owner, as a request of the core's own; returns its size. */
size_t init_copy(struct core *core, uint8_t *target, size_t room);

/* Complete the owner's reply. `message` has room for INIT_BYTES_MAX; returns its new size. */
size_t init_patch(struct core *core, uint8_t *message, size_t nbytes);

#endif
