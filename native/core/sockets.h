/* SOCK_SEQPACKET pairs: sizes, whole messages, descriptors. */
#ifndef CORE_SOCKETS_H
#define CORE_SOCKETS_H

#include <stddef.h>
#include <stdint.h>

/* Make a pair that carries messages as large as the process may ask for; returns 0 or -errno. */
int sockets_pair(int ends[2]);

/* Largest message that a socket can carry; 0 if it is not SOCK_SEQPACKET. */
size_t sockets_message_max(int fd);

/* Send one message. Returns 0 or -errno: -EAGAIN when the peer does not keep up. */
int sockets_send_nowait(int fd, const void *message, size_t nbytes);

/* Receive one message, waiting for it, with at most one descriptor (*passed, else -1); more are
 * closed. Returns its size, 0 at the peer's end, or -errno (-EMSGSIZE if it did not fit,
 * -EINTR after a signal). */
int64_t sockets_receive(int fd, void *buffer, size_t room, int *passed);

#endif
