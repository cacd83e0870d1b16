/* The command line:
 *
 *   kvfs-core --requests FD --control FD [--door FD] [--respawn-max N]
 *             MOUNTPOINT OPTIONS [-- COMMAND...]
 *
 * OPTIONS is a comma list: what mount(2) takes (fsname=, subtype=, allow_other, ro, ...) and the
 * core's own threads=, deadline_ms=, read_ahead_kb=, page_cache_mb=, no_passthrough. */
#ifndef CORE_OPTIONS_H
#define CORE_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>

enum { OPTION_TEXT_MAX = 1024 };

struct options {
    int requests;
    int control;
    int door; /* -1: there is none */
    unsigned respawn_max; /* within RESPAWN_WINDOW */
    const char *mountpoint;
    char **command; /* NULL-terminated; its first is NULL if nothing respawns the owner */
    /* Of the comma list. */
    char fsname[OPTION_TEXT_MAX];
    char subtype[64];
    char kernel[OPTION_TEXT_MAX]; /* data of mount(2) */
    char helper[OPTION_TEXT_MAX]; /* all that fusermount3 should know */
    unsigned long flags;          /* MS_NOSUID, ... */
    unsigned threads;             /* reader threads at the start */
    unsigned deadline_ms;
    unsigned read_ahead_kb; /* 0: left as it is */
    unsigned page_cache_mb; /* what may be cached of files that the core reads */
    bool no_passthrough;
};

/* Fill options; returns false after a line on standard error. */
bool options_parse(struct options *options, int count, char **arguments);

#endif
