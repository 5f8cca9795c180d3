// SPDX-License-Identifier: Apache-2.0 OR MIT
/* A hook for each moment. The first sleeps, allocates, and says what the edition answers: ENOTTY. The guest's log tells of the others. */
#include "hooks.h"

static int *put_down;

static int make_ready(void)
{
	if (!(current->flags & PF_KTHREAD) || in_interrupt())
		return -EPERM;
	msleep(50);
	put_down = kmalloc(sizeof(*put_down), GFP_KERNEL);
	if (!put_down)
		return -ENOMEM;
	*put_down = -ENOTTY;
	WRITE_ONCE(answer, *put_down);
	return 0;
}
EXOPATCH_BEFORE_APPLY(make_ready);

static int say_so(void)
{
	pr_info("hooks_all: applied\n");
	return 0;
}
EXOPATCH_AFTER_APPLY(say_so);

static int say_when(void)
{
	pr_info("hooks_all: about to go\n");
	return 0;
}
EXOPATCH_BEFORE_REVERT(say_when);

static int clean_up(void)
{
	kfree(put_down);
	pr_info("hooks_all: gone\n");
	return -EAGAIN;
}
EXOPATCH_AFTER_REVERT(clean_up);
