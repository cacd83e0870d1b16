/* READ, answered from segments or from a staging descriptor. */
#ifndef CORE_SERVE_READ_H
#define CORE_SERVE_READ_H

#include "requests.h"

/* Returns whether the request is answered; else the owner decides what becomes of it. */
bool serve_read(struct core *core, struct reader *reader, const struct request *request);

#endif
