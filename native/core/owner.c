#include "owner.h"

#include "door.h"
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

/* What a new owner finds in its environment. */
enum { REQUESTS, CONTROL, DOOR, ENDS };
static const char *const names[ENDS] = {"KVFS_CORE_REQUESTS=", "KVFS_CORE_CONTROL=",
                                        "KVFS_CORE_DOOR="};

static bool is_ours(const char *variable)
{
    for (size_t i = 0; i < ENDS; i++)
        if (strncmp(variable, names[i], strlen(names[i])) == 0)
            return true;
    return false;
}

/* The environment with these variables instead of those it has; to be freed, the strings not. */
static char **make_environment(char variables[ENDS][40])
{
    size_t n = 0;
    while (environ[n] != NULL)
        n++;
    char **made = calloc(n + ENDS + 1, sizeof *made);
    size_t used = 0;
    for (size_t i = 0; made != NULL && i < n; i++)
        if (!is_ours(environ[i]))
            made[used++] = environ[i];
    for (size_t i = 0; made != NULL && i < ENDS; i++)
        made[used++] = variables[i];
    return made;
}

/* Start COMMAND with the descriptors; its pid or -errno. */
static int spawn(char **command, const int ends[ENDS])
{
    char variables[ENDS][40];
    for (size_t i = 0; i < ENDS; i++)
        (void)snprintf(variables[i], sizeof variables[i], "%s%d", names[i], ends[i]);
    char **environment = make_environment(variables);
    if (environment == NULL)
        return -ENOMEM;
    posix_spawn_file_actions_t actions;
    posix_spawnattr_t attributes;
    sigset_t signals;
    (void)posix_spawn_file_actions_init(&actions);
    (void)posix_spawnattr_init(&attributes);
    /* Onto itself: the child's copy loses its close-on-exec flag. */
    for (size_t i = 0; i < ENDS; i++)
        (void)posix_spawn_file_actions_adddup2(&actions, ends[i], ends[i]);
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

static char **command_of(const struct owner *owner, const struct core *core)
{
    return owner->command != NULL ? owner->command : core->options.command;
}

static void close_pair(const int pair[2])
{
    for (size_t i = 0; i < 2; i++)
        if (pair[i] >= 0)
            (void)close(pair[i]);
}

static int renew(struct core *core, int requests, int control)
{
    uint8_t init[INIT_BYTES_MAX];
    size_t nbytes = init_copy(core, init, sizeof init);
    return link_renew(&core->link, requests, control, init, nbytes);
}

static bool respawn(struct owner *owner, struct core *core)
{
    int pairs[ENDS][2] = {{-1, -1}, {-1, -1}, {-1, -1}};
    char **command = command_of(owner, core);
    int status = 0;
    for (size_t i = 0; i < ENDS && status == 0; i++)
        status = sockets_pair(pairs[i]);
    if (status == 0) {
        int pid = spawn(command, (int[ENDS]){pairs[0][1], pairs[1][1], pairs[2][1]});
        if (pid > 0) {
            owner->child = pid;
            atomic_store(&core->is_given, false);
            atomic_store(&core->allowed_ns, 0);
            status = renew(core, pairs[REQUESTS][0], pairs[CONTROL][0]);
            if (core->door >= 0)
                (void)close(core->door);
            core->door = pairs[DOOR][0];
            pairs[DOOR][0] = -1;
        } else {
            status = pid;
        }
    }
    for (size_t i = 0; i < ENDS; i++)
        close_pair(pairs[i]);
    if (status != 0)
        log_line("the owner cannot be started again: %s: %s", command[0], strerror(-status));
    return status == 0;
}

/* Nobody comes by the door: start COMMAND. */
static bool replace(struct owner *owner, struct core *core)
{
    char **command = command_of(owner, core);
    owner->is_awaited = false;
    if (command[0] == NULL) {
        threads_fail_pending(core, true, ENOTCONN);
        log_line("the owner is gone: %s is unmounted", core->mount.path);
        return false;
    }
    end_child(owner);
    if (!may_respawn(owner, core->options.respawn_max)) {
        log_line("the owner died %u times within %d s: %s is unmounted",
                 core->options.respawn_max + 1, WINDOW_S, core->mount.path);
        return false;
    }
    log_line("the owner is gone, starting another: %s", command[0]);
    count(&core->counters.respawns, 1);
    return respawn(owner, core);
}

/* Wait for the threads to know that the owner is gone, and forget what was its. */
static void part(struct core *core)
{
    link_wait_parked(&core->link);
    threads_fail_pending(core, false, EIO);
    filter_remove(&core->filter);
    files_next_owner(&core->files);
    /* The next owner's numbers start anew; installed files keep what they read. */
    segments_drop_all(&core->segments);
}

bool owner_lost(struct owner *owner, struct core *core)
{
    if (atomic_load(&core->link.is_up))
        return true; /* another one is here already */
    bool has_command = command_of(owner, core)[0] != NULL;
    bool is_awaited = core->door >= 0 && (atomic_load(&core->is_given) || !has_command);
    if (!has_command && !is_awaited) { /* what waits is told how it ends */
        link_wait_parked(&core->link);
        threads_fail_pending(core, true, ENOTCONN);
    }
    part(core);
    if (!is_awaited)
        return replace(owner, core);
    owner->is_awaited = true;
    return owner_look(owner, core);
}

/* Let an owner in, whose sockets are these. */
static bool enter(struct owner *owner, struct core *core, const struct visit *visit)
{
    char **command = door_command(visit);
    size_t message_max = sockets_message_max(visit->requests);
    if (command == NULL || message_max < core->payload_max + MESSAGE_HEADERS ||
        sockets_message_max(visit->control) == 0) {
        log_line("an owner cannot come in: its sockets carry %zu bytes", message_max);
        free(command);
        return false;
    }
    if (atomic_load(&core->link.is_up)) {
        link_lost(&core->link, atomic_load(&core->link.generation));
        part(core);
    }
    /* The one before ends by itself: it may wait for this one to be ready. */
    owner->child = 0;
    owner->is_awaited = false;
    free(owner->command);
    owner->command = command;
    atomic_store(&core->is_given, true); /* until it says that it stays: HOLD 0 */
    int status = renew(core, visit->requests, visit->control);
    if (status != 0)
        log_line("another owner was lost: %s", strerror(-status));
    return status == 0;
}

bool owner_look(struct owner *owner, struct core *core)
{
    static struct visit visit; /* too large for a stack */
    if (core->door < 0)
        return true;
    switch (door_look(core->door, &visit)) {
    case DOOR_VISIT: {
        bool is_in = enter(owner, core, &visit);
        (void)close(visit.requests);
        (void)close(visit.control);
        if (!is_in && !atomic_load(&core->link.is_up))
            owner->is_awaited = true;
        return true;
    }
    case DOOR_CLOSED:
        (void)close(core->door);
        core->door = -1;
        return owner->is_awaited ? replace(owner, core) : true;
    case DOOR_QUIET:
        break;
    }
    return true;
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
