#include "options.h"

#include "log.h"

#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <unistd.h>

enum { THREADS_MAX = 16, DEADLINE_MS_MAX = 3600000, READ_AHEAD_KB_MAX = 1 << 20,
       PAGE_CACHE_MB_MAX = 1 << 30, MEMORY_PARTS = 4 };

static const struct {
    const char *name;
    unsigned long flag;
    bool is_set;
} mount_flags[] = {
    {"ro", MS_RDONLY, true},       {"rw", MS_RDONLY, false},     {"nosuid", MS_NOSUID, true},
    {"suid", MS_NOSUID, false},    {"nodev", MS_NODEV, true},    {"dev", MS_NODEV, false},
    {"noexec", MS_NOEXEC, true},   {"exec", MS_NOEXEC, false},   {"sync", MS_SYNCHRONOUS, true},
    {"noatime", MS_NOATIME, true}, {"dirsync", MS_DIRSYNC, true}};

static bool to_number(const char *text, unsigned least, unsigned most, unsigned *value)
{
    char *end = NULL;
    errno = 0;
    unsigned long number = strtoul(text, &end, 10);
    if (errno != 0 || end == text || *end != '\0' || *text == '-' || number < least ||
        number > most)
        return false;
    *value = (unsigned)number;
    return true;
}

/* Append an item to a comma list. */
static bool append(char *list, const char *item)
{
    size_t used = strlen(list);
    size_t added = strlen(item) + (used > 0);
    if (used + added >= OPTION_TEXT_MAX)
        return false;
    if (used > 0)
        list[used++] = ',';
    strcpy(list + used, item);
    return true;
}

static bool set_text(char *target, size_t room, const char *text)
{
    if (strlen(text) >= room)
        return false;
    strcpy(target, text);
    return true;
}

/* Take one of the core's own options; *is_own tells whether it was one. */
static bool take_own(struct options *options, const char *item, bool *is_own)
{
    static const struct {
        const char *prefix;
        size_t offset;
        unsigned least, most;
    } numbers[] = {
        {"threads=", offsetof(struct options, threads), 1, THREADS_MAX},
        {"deadline_ms=", offsetof(struct options, deadline_ms), 10, DEADLINE_MS_MAX},
        {"read_ahead_kb=", offsetof(struct options, read_ahead_kb), 0, READ_AHEAD_KB_MAX},
        {"page_cache_mb=", offsetof(struct options, page_cache_mb), 0, PAGE_CACHE_MB_MAX},
    };
    *is_own = true;
    if (strcmp(item, "no_passthrough") == 0) {
        options->no_passthrough = true;
        return true;
    }
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        size_t length = strlen(numbers[i].prefix);
        if (strncmp(item, numbers[i].prefix, length) == 0)
            return to_number(item + length, numbers[i].least, numbers[i].most,
                             (unsigned *)((char *)options + numbers[i].offset));
    }
    *is_own = false;
    return true;
}

static bool take_item(struct options *options, const char *item)
{
    bool is_own;
    if (!take_own(options, item, &is_own))
        return false;
    if (is_own)
        return true;
    if (!append(options->helper, item))
        return false;
    if (strncmp(item, "fsname=", 7) == 0)
        return set_text(options->fsname, sizeof options->fsname, item + 7);
    if (strncmp(item, "subtype=", 8) == 0)
        return set_text(options->subtype, sizeof options->subtype, item + 8);
    for (size_t i = 0; i < sizeof mount_flags / sizeof *mount_flags; i++) {
        if (strcmp(item, mount_flags[i].name) != 0)
            continue;
        if (mount_flags[i].is_set)
            options->flags |= mount_flags[i].flag;
        else
            options->flags &= ~mount_flags[i].flag;
        return true;
    }
    return append(options->kernel, item);
}

static bool take_list(struct options *options, const char *list)
{
    char *copy = strdup(list);
    if (copy == NULL)
        return false;
    char *position = NULL;
    for (char *item = strtok_r(copy, ",", &position); item != NULL;
         item = strtok_r(NULL, ",", &position)) {
        if (!take_item(options, item)) {
            log_line("bad option: %s: out of range or too long", item);
            free(copy);
            return false;
        }
    }
    free(copy);
    return true;
}

/* A part of the machine's memory. */
static unsigned page_cache_default(void)
{
    long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
    uint64_t nbytes = pages < 0 || page < 0 ? 0 : (uint64_t)pages * (uint64_t)page / MEMORY_PARTS;
    return (unsigned)(nbytes >> 20);
}

static void set_defaults(struct options *options)
{
    static char *no_command[] = {NULL};
    long cpus = sysconf(_SC_NPROCESSORS_ONLN);
    *options = (struct options){
        .requests = -1,
        .control = -1,
        .door = -1,
        .respawn_max = 5,
        .command = no_command,
        .fsname = "kvfs",
        .subtype = "kvfs",
        .threads = cpus < 2 ? 2 : cpus > 4 ? 4 : (unsigned)cpus,
        .deadline_ms = 5000,
        .read_ahead_kb = 8192,
        .page_cache_mb = page_cache_default(),
    };
}

/* Take the value of a --flag; -1 if it is not a number. */
static bool take_flag(struct options *options, const char *flag, const char *value)
{
    unsigned number;
    if (value == NULL || !to_number(value, 0, 1 << 20, &number))
        return false;
    if (strcmp(flag, "--requests") == 0)
        options->requests = (int)number;
    else if (strcmp(flag, "--control") == 0)
        options->control = (int)number;
    else if (strcmp(flag, "--door") == 0)
        options->door = (int)number;
    else if (strcmp(flag, "--respawn-max") == 0)
        options->respawn_max = number;
    else
        return false;
    return true;
}

bool options_parse(struct options *options, int count, char **arguments)
{
    set_defaults(options);
    int at = 1;
    for (; at < count && strncmp(arguments[at], "--", 2) == 0; at += 2) {
        if (!take_flag(options, arguments[at], at + 1 < count ? arguments[at + 1] : NULL)) {
            log_line("bad argument: %s", arguments[at]);
            return false;
        }
    }
    if (count - at < 2 || options->requests < 0 || options->control < 0) {
        log_line("usage: kvfs-core --requests FD --control FD [--door FD] "
                 "[--respawn-max N] MOUNTPOINT OPTIONS [-- COMMAND...]");
        return false;
    }
    options->mountpoint = arguments[at++];
    if (!take_list(options, arguments[at++]))
        return false;
    if (at < count) {
        if (strcmp(arguments[at], "--") != 0) {
            log_line("unexpected argument: %s: a command comes after --", arguments[at]);
            return false;
        }
        options->command = arguments + at + 1;
    }
    return true;
}
