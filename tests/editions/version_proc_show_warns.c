// SPDX-License-Identifier: Apache-2.0 OR MIT
/*
 * /proc/version gets a line with what two reads of the kernel's memory gave: of a place that is there, and of one that is not. Each read of the
 * file warns, the first one once more.
 */
#include <linux/bug.h>
#include <linux/seq_file.h>

#include <asm/asm.h>

#include "exopatch.h"

static int version_proc_show_warns(struct seq_file *m, void *v);
EXOPATCH_REPLACES(version_proc_show, version_proc_show_warns);

static int there = 42;

/* What is at @from, or -EFAULT: the load is left out when it faults. */
static noinline int value_at(int *from)
{
	int value = -EFAULT;

	asm volatile("1: movl %1, %0\n"
		     "2:\n"
		     _ASM_EXTABLE(1b, 2b)
		     : "+r" (value) : "m" (*from));
	return value;
}

static int version_proc_show_warns(struct seq_file *m, void *v)
{
	int err = EXOPATCH_ORIGINAL(version_proc_show)(m, v);

	/* The last page of all is never there. */
	seq_printf(m, "read %d %d\n", value_at(&there), value_at((int *)-4096L));
	WARN_ON(there == 42);
	WARN_ONCE(there == 42, "said once\n");
	return err;
}
