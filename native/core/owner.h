/* The owner's death, and what follows: another owner, or the end. For the main thread. */
#ifndef CORE_OWNER_H
#define CORE_OWNER_H

#include "core.h"

#include <sys/types.h>

enum { RESPAWNS_NOTED = 64 };

struct owner {
    pid_t child; /* 0: none of ours */
    int64_t respawned_ns[RESPAWNS_NOTED];
    unsigned respawn_count;
    bool is_awaited; /* nobody is here; somebody may come by the door */
    char **command;  /* of the last who came; NULL: it is the options' */
};

/* Take notice of the death: fail what waited for it. Then start COMMAND, or wait for who comes by
 * the door; false: the mount ends. */
bool owner_lost(struct owner *owner, struct core *core);

/* Let in who is at the door; false: nobody is here, and nobody can come: the mount ends. */
bool owner_look(struct owner *owner, struct core *core);

/* Reap children that ended. */
void owner_reap(struct owner *owner);

#endif
