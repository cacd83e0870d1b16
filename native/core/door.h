/* The door: by it another owner comes in, without the one before having started it.
 *
 * A socket of packets whose other end is in the hands of the owner, and of whoever it gave it to:
 * the process that takes over, or the service manager. A packet brings the core's ends of the new
 * owner's two sockets, requests first, and the command that starts it again when it dies: strings
 * that end with 0; the first of them empty: none. When nobody has the other end any more, nobody
 * can come.
 * For the main thread. */
#ifndef CORE_DOOR_H
#define CORE_DOOR_H

#include <stddef.h>

enum { VISIT_BYTES_MAX = 64 << 10 };

struct visit {
    int requests, control;
    size_t nbytes;
    char bytes[VISIT_BYTES_MAX];
};

enum door_state { DOOR_QUIET, DOOR_VISIT, DOOR_CLOSED };

/* See who is there, without waiting; the caller closes a visit's descriptors. */
enum door_state door_look(int door, struct visit *visit);

/* A command of a visit as an array that ends with NULL; one block, to be freed. NULL: no memory. */
char **door_command(const struct visit *visit);

#endif
