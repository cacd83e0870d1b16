#include "owner.h"

#include "init.h"
#include "sockets.h"
#include "threads.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

enum { WINDOW_S = 60, CHILD_WAIT_MS = 1000 };

/* The environment with the two variables replaced; to be freed, the strings not. */
static char **make_environment(char *requests, char *control)
{
    static const char *const names[] = {"KVFS_CORE_REQUESTS=", "KVFS_CORE_CONTROL="};
    size_t n = 0;
    while (environ[n] != NULL)
        n++;
    char **made = calloc(n + 3, sizeof *made);
    size_t used = 0;
    for (size_t i = 0; made != NULL && i < n; i++)
        if (strncmp(environ[i], names[0], strlen(names[0])) != 0 &&
            strncmp(environ[i], names[1], strlen(names[1])) != 0)
            made[used++] = environ[i];
    if (made != NULL) {
        made[used++] = requests;
        made[used++] = control;
    }
    return made;
}

/* Start COMMAND with the two descriptors; its pid or -errno. */
static int spawn(char **command, int requests, int control)
{
    char variables[2][40];
    (void)snprintf(variables[0], sizeof variables[0], "KVFS_CORE_REQUESTS=%d", requests);
    (void)snprintf(variables[1], sizeof variables[1], "KVFS_CORE_CONTROL=%d", control);
    char **environment = make_environment(variables[0], variables[1]);
    if (environment == NULL)
        return -ENOMEM;
    posix_spawn_file_actions_t actions;
    posix_spawnattr_t attributes;
    sigset_t signals;
    (void)posix_spawn_file_actions_init(&actions);
    (void)posix_spawnattr_init(&attributes);
    /* Onto itself: the child's copy loses its close-on-exec flag. */
    (void)posix_spawn_file_actions_adddup2(&actions, requests, requests);
    (void)posix_spawn_file_actions_adddup2(&actions, control, control);
    sigemptyset(&signals);
    (void)posix_spawnattr_setsigmask(&attributes, &signals);
    sigaddset(&signals, SIGPIPE);
    (void)posix_spawnattr_setsigdefault(&attributes, &signals);
    (void)posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK |
                                                    POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETSID);
    pid_t pid = 0;
    int status = posix_spawnp(&pid, command[0], &actions, &attributes, command, environment);
    (void)posix_spawn_file_actions_destroy(&actions);
    (void)posix_spawnattr_destroy(&attributes);
    free(environment);
    return status == 0 ? pid : -status;
}

/* Whether there may be one more within the window; notes it. */
static bool may_respawn(struct owner *owner, unsigned most)
{
    int64_t now = now_ns();
    if (most > RESPAWNS_NOTED)
        most = RESPAWNS_NOTED;
    if (most == 0)
        return false;
    int64_t *slot = &owner->respawned_ns[owner->respawn_count % most];
    if (owner->respawn_count >= most && now - *slot < WINDOW_S * NS_PER_S)
        return false;
    *slot = now;
    owner->respawn_count++;
    return true;
}

/* An owner that closed its sockets but lives on would keep the pool locked. */
static void end_child(struct owner *owner)
{
    int64_t end = now_ns() + CHILD_WAIT_MS * NS_PER_MS;
    while (owner->child > 0) {
        owner_reap(owner);
        if (owner->child > 0 && now_ns() > end)
            (void)kill(owner->child, SIGKILL);
        if (owner->child > 0)
            sleep_ms(5);
    }
}

static bool respawn(struct owner *owner, struct core *core)
{
    int requests[2], control[2];
    uint8_t init[INIT_BYTES_MAX];
    if (sockets_pair(requests) != 0)
        return false;
    int status = sockets_pair(control);
    if (status == 0) {
        int pid = spawn(core->options.command, requests[1], control[1]);
        (void)close(requests[1]);
        (void)close(control[1]);
        if (pid > 0) {
            owner->child = pid;
            size_t nbytes = init_copy(core, init, sizeof init);
            status = link_renew(&core->link, requests[0], control[0], init, nbytes);
        } else {
            status = pid;
        }
        (void)close(control[0]);
    } else {
        (void)close(requests[1]);
    }
    (void)close(requests[0]);
    if (status != 0)
        log_line("the owner cannot be started again: %s: %s", core->options.command[0],
                 strerror(-status));
    return status == 0;
}

bool owner_replace(struct owner *owner, struct core *core)
{
    bool has_command = core->options.command[0] != NULL;
    link_wait_parked(&core->link);
    threads_fail_pending(core, !has_command, has_command ? EIO : ENOTCONN);
    filter_remove(&core->filter);
    files_next_owner(&core->files);
    /* The next owner's numbers start anew; installed files keep what they read. */
    segments_drop_all(&core->segments);
    if (!has_command) {
        log_line("the owner is gone: %s is unmounted", core->mount.path);
        return false;
    }
    end_child(owner);
    if (!may_respawn(owner, core->options.respawn_max)) {
        log_line("the owner died %u times within %d s: %s is unmounted",
                 core->options.respawn_max + 1, WINDOW_S, core->mount.path);
        return false;
    }
    log_line("the owner is gone, starting another: %s", core->options.command[0]);
    count(&core->counters.respawns, 1);
    return respawn(owner, core);
}

void owner_reap(struct owner *owner)
{
    pid_t pid;
    int status;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
        if (pid == owner->child)
            owner->child = 0;
    if (pid < 0 && errno == ECHILD)
        owner->child = 0;
}
