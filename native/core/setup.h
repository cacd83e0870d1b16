/* Making and freeing what a core consists of. */
#ifndef CORE_SETUP_H
#define CORE_SETUP_H

#include "core.h"

/* Close all descriptors but those of the options and 0 to 2. */
void setup_descriptors(const struct options *options);

/* Whether the sockets of the options are such; marks them close-on-exec, and takes from their
 * size how much a request may move. A line on standard error if not. */
bool setup_sockets(struct core *core);

/* All but mount and threads. REQUIRES: options, device and sizes are set. 0 or -errno. */
int setup_create(struct core *core);

/* Free all. REQUIRES: no thread but the caller's runs. */
void setup_destroy(struct core *core);

#endif
