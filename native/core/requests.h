/* Requests from the kernel: answered here, or sent to the owner. */
#ifndef CORE_REQUESTS_H
#define CORE_REQUESTS_H

#include "reader.h"

/* Handle one request as read from the device; any bytes are survived. */
void requests_handle(struct core *core, struct reader *reader, const uint8_t *bytes,
                     size_t nbytes);

/* Send a request to the owner, and note that it is pending; answers it if that cannot be. */
void requests_forward(struct core *core, struct reader *reader, const struct request *request);

#endif
