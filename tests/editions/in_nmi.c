// SPDX-License-Identifier: Apache-2.0 OR MIT
/* An edition of what prints a processor's registers: the original, and a witness that an NMI asked for them. */
#include <linux/preempt.h>
#include <linux/ptrace.h>
#include <linux/sched/debug.h>

#include "witness.h"

static void show_regs_seen(struct pt_regs *regs);
EXOPATCH_REPLACES(show_regs, show_regs_seen);

static void show_regs_seen(struct pt_regs *regs)
{
	witness(in_nmi());
	EXOPATCH_ORIGINAL(show_regs)(regs);
}
