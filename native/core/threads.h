/* The threads beside the readers. Each ends when the core does. */
#ifndef CORE_THREADS_H
#define CORE_THREADS_H

#include "core.h"

/* Start sender, pump, notifier, control and watchdog; 0 or -errno. */
int threads_start(struct core *core);

/* Answer all that waits for the owner; with `is_all`, also what it was not sent yet. */
void threads_fail_pending(struct core *core, bool is_all, int error);

/* Answer what is overdue, once. */
void threads_check_deadlines(struct core *core);

#endif
