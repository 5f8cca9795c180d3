// SPDX-License-Identifier: Apache-2.0 OR MIT
/* An edition of what every timer interrupt comes to: the original, and a witness that it was one. */
#include <linux/clockchips.h>
#include <linux/hrtimer.h>
#include <linux/irqflags.h>
#include <linux/preempt.h>

#include "witness.h"

static void hrtimer_interrupt_seen(struct clock_event_device *dev);
EXOPATCH_REPLACES(hrtimer_interrupt, hrtimer_interrupt_seen);

static void hrtimer_interrupt_seen(struct clock_event_device *dev)
{
	witness(in_hardirq() && irqs_disabled());
	EXOPATCH_ORIGINAL(hrtimer_interrupt)(dev);
}
