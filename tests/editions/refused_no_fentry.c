// SPDX-License-Identifier: Apache-2.0 OR MIT
/* Replaces a function of the entry code, which has no fentry site. */
#include <linux/entry-common.h>

#include "exopatch.h"

static void no_fentry(struct pt_regs *regs, irqentry_state_t state);
EXOPATCH_REPLACES(irqentry_exit, no_fentry);

static void no_fentry(struct pt_regs *regs, irqentry_state_t state)
{
}
