// SPDX-License-Identifier: Apache-2.0 OR MIT
/*
 * /proc/version gets a second line, "edition N", where N counts the reads that this edition has served.
 * It uses all that an edition may have: the original, a function of the kernel, a constant and a variable of its own.
 */
#include <linux/atomic.h>
#include <linux/seq_file.h>

#include "exopatch.h"

static int version_proc_show_counted(struct seq_file *m, void *v);
EXOPATCH_REPLACES(version_proc_show, version_proc_show_counted);

static atomic_t served = ATOMIC_INIT(0);

static int version_proc_show_counted(struct seq_file *m, void *v)
{
	int err = EXOPATCH_ORIGINAL(version_proc_show)(m, v);

	seq_printf(m, "edition %d\n", atomic_inc_return(&served));
	return err;
}
