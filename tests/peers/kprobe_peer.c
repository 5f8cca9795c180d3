// SPDX-License-Identifier: Apache-2.0 OR MIT
/* unix_ioctl replaced by a kprobe that leads elsewhere: see answer.h. */
#include <linux/kprobes.h>
#include <linux/module.h>

#include "answer.h"

static int lead(struct kprobe *probe, struct pt_regs *regs)
{
	instruction_pointer_set(regs, (unsigned long)answer);
	return 1;
}

static struct kprobe probe = {
	.symbol_name = "unix_ioctl",
	.pre_handler = lead,
};

static int __init begin(void)
{
	return register_kprobe(&probe);
}

static void __exit end(void)
{
	unregister_kprobe(&probe);
}

module_init(begin);
module_exit(end);
MODULE_LICENSE("Dual MIT/GPL");
MODULE_DESCRIPTION("A kprobe to be measured");
