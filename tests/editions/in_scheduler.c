// SPDX-License-Identifier: Apache-2.0 OR MIT
/* An edition of a function that the scheduler calls with a queue of tasks locked: the original, and a witness that interrupts were off. */
#include <linux/irqflags.h>
#include <linux/sched.h>

#include "witness.h"

struct rq;

static void update_rq_clock_seen(struct rq *rq);
EXOPATCH_REPLACES(update_rq_clock, update_rq_clock_seen);

static void update_rq_clock_seen(struct rq *rq)
{
	witness(irqs_disabled());
	EXOPATCH_ORIGINAL(update_rq_clock)(rq);
}
