// SPDX-License-Identifier: Apache-2.0 OR MIT
/* An edition that is for kernel threads only, and warns of everybody else. */
#include <linux/bug.h>
#include <linux/sched.h>

#include "exopatch.h"

static signed long schedule_timeout_kthread(signed long timeout);
EXOPATCH_REPLACES(schedule_timeout, schedule_timeout_kthread);

static signed long schedule_timeout_kthread(signed long timeout)
{
	WARN_ON_ONCE(!(current->flags & PF_KTHREAD));
	return EXOPATCH_ORIGINAL(schedule_timeout)(timeout);
}
