/* WRITE and FALLOCATE, done on a staging descriptor as far as the owner gave credit. */
#ifndef CORE_SERVE_WRITE_H
#define CORE_SERVE_WRITE_H

#include "requests.h"

/* Both return whether the request is answered; else it goes to the owner. */
bool serve_write(struct core *core, struct reader *reader, const struct request *request);
bool serve_fallocate(struct core *core, struct reader *reader, const struct request *request);

#endif
