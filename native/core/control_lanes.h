/* The control messages that concern file handles.
 *
 * Each handler returns the result (-errno), and may fill the answer's payload. It takes the
 * descriptor by setting it to -1; what is left is closed. REQUIRES: the least payload of the table
 * in control.c. */
#ifndef CORE_CONTROL_LANES_H
#define CORE_CONTROL_LANES_H

#include "core.h"

struct message {
    uint64_t argument;
    const uint8_t *payload;
    size_t nbytes;
    int fd;
};

struct answer {
    uint8_t *payload;
    size_t room;
    size_t nbytes;
};

int64_t read_begin(struct core *core, struct message *message, struct answer *answer);
int64_t read_blocks(struct core *core, struct message *message, struct answer *answer);
int64_t read_end(struct core *core, struct message *message, struct answer *answer);
int64_t write_begin(struct core *core, struct message *message, struct answer *answer);
int64_t write_credit(struct core *core, struct message *message, struct answer *answer);
int64_t digests(struct core *core, struct message *message, struct answer *answer);
int64_t backing_begin(struct core *core, struct message *message, struct answer *answer);
int64_t close_handle(struct core *core, struct message *message, struct answer *answer);

#endif
