#include "door.h"

#include "log.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { DESCRIPTORS = 2, DESCRIPTORS_MAX = 8 };

/* Take the descriptors of a packet if they are two; close them if not. */
static bool take_descriptors(struct msghdr *message, struct visit *visit)
{
    int fds[DESCRIPTORS_MAX];
    size_t count = 0;
    for (struct cmsghdr *part = CMSG_FIRSTHDR(message); part != NULL;
         part = CMSG_NXTHDR(message, part)) {
        if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS)
            continue;
        size_t more = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < more && count < DESCRIPTORS_MAX; i++)
            memcpy(&fds[count++], CMSG_DATA(part) + i * sizeof(int), sizeof(int));
    }
    if (count == DESCRIPTORS && !(message->msg_flags & (MSG_TRUNC | MSG_CTRUNC))) {
        visit->requests = fds[0];
        visit->control = fds[1];
        return true;
    }
    while (count > 0)
        (void)close(fds[--count]);
    return false;
}

enum door_state door_look(int door, struct visit *visit)
{
    _Alignas(struct cmsghdr) char space[CMSG_SPACE(DESCRIPTORS_MAX * sizeof(int))];
    struct iovec part = {.iov_base = visit->bytes, .iov_len = sizeof visit->bytes};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    message.msg_control = space;
    message.msg_controllen = sizeof space;
    ssize_t received = recvmsg(door, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    if (received < 0)
        return errno == EAGAIN || errno == EINTR ? DOOR_QUIET : DOOR_CLOSED;
    if (take_descriptors(&message, visit)) {
        visit->nbytes = (size_t)received;
        return DOOR_VISIT;
    }
    if (received == 0)
        return DOOR_CLOSED;
    log_line("a packet of %zd bytes at the door brings no sockets", received);
    return DOOR_QUIET;
}

char **door_command(const struct visit *visit)
{
    size_t count = 0;
    bool is_empty = visit->nbytes == 0 || visit->bytes[0] == '\0';
    for (size_t i = 0; i < visit->nbytes && !is_empty; i++)
        count += visit->bytes[i] == '\0';
    size_t pointers = (count + 1) * sizeof(char *);
    char **command = calloc(1, pointers + visit->nbytes + 1);
    if (command == NULL)
        return NULL;
    char *text = (char *)command + pointers;
    memcpy(text, visit->bytes, visit->nbytes);
    for (size_t i = 0; i < count; i++) {
        command[i] = text;
        text += strlen(text) + 1;
    }
    return command;
}
