/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * Hooks: code of a package that runs in the guest before and after its editions come into effect, or go. `exopatch build` puts this
 * file beside the edition's source:
 *
 *	#include "exopatch.h"
 *	#include "exopatch_hooks.h"
 *
 *	static int make_ready(void)
 *	{
 *		table = kmalloc(SIZE, GFP_KERNEL);
 *		return table ? 0 : -ENOMEM;
 *	}
 *	EXOPATCH_BEFORE_APPLY(make_ready);
 *
 * A hook runs once each time, in a worker thread of the kernel: it may sleep, and has until the operation's deadline. Zero lets the switch go
 * on. Anything else of a hook that runs before keeps the switch from being made, and of one that runs behind is told. One that was begun
 * and has not ended by the deadline keeps the switch from being made too, and goes on; the package's code stays in the guest until it has.
 * Behind a switch, tasks may still be on its old side (`exopatch update show`).
 * What a hook leaves behind that knows an address of the package (a timer, a work item) keeps its code in the guest for good, as with editions.
 */
#ifndef EXOPATCH_HOOKS_H
#define EXOPATCH_HOOKS_H

#include <linux/atomic.h>
#include <linux/hrtimer.h>
#include <linux/workqueue.h>

#include "exopatch.h"

struct exopatch_hook {
	const void *hook;
	__u32 size;		/* of this record: tells readers its layout */
	__u32 moment;
	char name[EXOPATCH_NAME_LEN];
};

#define EXOPATCH_HOOK(MOMENT, NUMBER, FUNCTION)							\
	static const struct exopatch_hook exopatch_hook_##MOMENT				\
		__used __section(".exopatch.hooks") __aligned(8) = {				\
			.hook = FUNCTION,							\
			.size = sizeof(struct exopatch_hook),					\
			.moment = NUMBER,							\
			.name = #FUNCTION,							\
		}

/* `int FUNCTION(void)`, defined before, runs at that moment. There is one for each at most. */
#define EXOPATCH_BEFORE_APPLY(FUNCTION) EXOPATCH_HOOK(before_apply, 0, FUNCTION)
#define EXOPATCH_AFTER_APPLY(FUNCTION) EXOPATCH_HOOK(after_apply, 1, FUNCTION)
#define EXOPATCH_BEFORE_REVERT(FUNCTION) EXOPATCH_HOOK(before_revert, 2, FUNCTION)
#define EXOPATCH_AFTER_REVERT(FUNCTION) EXOPATCH_HOOK(after_revert, 3, FUNCTION)

/*
 * How they get to run. While a hook is to run, exopatch leads the kernel's timer interrupt to exopatch_ticker(), which queues a work item once;
 * the two sides talk by these words, of which each writes its own. Runs are numbered from 1.
 */
static struct exopatch_hooks {
	unsigned long hook;	/* by exopatch: what to call */
	unsigned long asked;	/* by exopatch: the run that is to be made */
	unsigned long taken;	/* by the guest: the last one that was queued */
	unsigned long ended;	/* by the guest: the last one that has ended */
	unsigned long result;	/* by the guest: what that returned */
	struct work_struct work;
} exopatch_hooks;

static void exopatch_run_hook(struct work_struct *work)
{
	int (*hook)(void) = (int (*)(void))READ_ONCE(exopatch_hooks.hook);
	unsigned long run = READ_ONCE(exopatch_hooks.taken);

	WRITE_ONCE(exopatch_hooks.result, (long)hook());
	smp_store_release(&exopatch_hooks.ended, run);
}

static struct exopatch_hooks exopatch_hooks __section(".data..exopatch_hooks") __aligned(64) = {
	.work = __WORK_INITIALIZER(exopatch_hooks.work, exopatch_run_hook),
};

extern void exopatch_original_hrtimer_interrupt(struct clock_event_device *device);

static void exopatch_ticker(struct clock_event_device *device)
{
	unsigned long asked = smp_load_acquire(&exopatch_hooks.asked);
	unsigned long taken = READ_ONCE(exopatch_hooks.taken);

	/* The work item is free: no run is asked for before the one before it has ended. */
	if (asked > taken && cmpxchg(&exopatch_hooks.taken, taken, asked) == taken)
		queue_work(system_unbound_wq, &exopatch_hooks.work);
	exopatch_original_hrtimer_interrupt(device);
}

static const struct exopatch_edition exopatch_ticker_of_package
	__used __section(".exopatch.ticker") __aligned(8) = {
		.edition = exopatch_ticker,
		.size = sizeof(struct exopatch_edition),
		.function = "hrtimer_interrupt",
	};

#endif
