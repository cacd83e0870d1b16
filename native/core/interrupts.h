/* Signals for those who wait.
 *
 * The kernel tells of any signal, a harmless one of a profiler, too; answering EINTR then would
 * fail calls that never fail so on other filesystems, and report a rename as failed that takes
 * place. So only a caller that is being killed is answered at once, any other after a while: a
 * hung mount can still be left by Ctrl-C. */
#ifndef CORE_INTERRUPTS_H
#define CORE_INTERRUPTS_H

#include "reader.h"

/* An INTERRUPT of the kernel. */
void interrupts_receive(struct core *core, const struct request *request);

/* For the watchdog: answer whose time has come. */
void interrupts_check(struct core *core);

#endif
