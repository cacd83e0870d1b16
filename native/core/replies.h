/* Replies from the owner: completed, noted, and taken to the kernel; late ones undone. */
#ifndef CORE_REPLIES_H
#define CORE_REPLIES_H

#include "core.h"

/* Handle one message of the owner. `bytes` has room for INIT_BYTES_MAX at least; any bytes are
 * survived. */
void replies_handle(struct core *core, uint8_t *bytes, size_t nbytes);

/* Largest message that the owner can send. */
size_t replies_room(const struct core *core);

#endif
