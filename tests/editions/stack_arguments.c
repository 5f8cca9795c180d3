// SPDX-License-Identifier: Apache-2.0 OR MIT
/* An edition of a function that has two or three arguments on the stack: the original, and a witness that those are the caller's own variables. */
#include <linux/fs.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/sched/task_stack.h>
#include <linux/version.h>

#include "witness.h"

/* The sixth and the seventh argument of newer kernels, of which older ones have one. */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 6, 0)
#define PARAMETERS vm_flags_t vm_flags, unsigned long pgoff
#define ARGUMENTS vm_flags, pgoff
#else
#define PARAMETERS unsigned long pgoff
#define ARGUMENTS pgoff
#endif

static unsigned long do_mmap_seen(struct file *file, unsigned long addr, unsigned long len, unsigned long prot, unsigned long flags,
				  PARAMETERS, unsigned long *populate, struct list_head *uf);
EXOPATCH_REPLACES(do_mmap, do_mmap_seen);

static unsigned long do_mmap_seen(struct file *file, unsigned long addr, unsigned long len, unsigned long prot, unsigned long flags,
				  PARAMETERS, unsigned long *populate, struct list_head *uf)
{
	witness(object_is_on_stack(populate) && object_is_on_stack(uf) && (file || !pgoff));
	return EXOPATCH_ORIGINAL(do_mmap)(file, addr, len, prot, flags, ARGUMENTS, populate, uf);
}
