// SPDX-License-Identifier: Apache-2.0 OR MIT
/* unix_ioctl replaced by the guest kernel's own livepatch: see answer.h. */
#include <linux/livepatch.h>
#include <linux/module.h>

#include "answer.h"

static struct klp_func functions[] = {
	{ .old_name = "unix_ioctl", .new_func = answer },
	{ },
};

static struct klp_object objects[] = {
	{ .funcs = functions },
	{ },
};

static struct klp_patch patch = {
	.mod = THIS_MODULE,
	.objs = objects,
};

static int __init begin(void)
{
	return klp_enable_patch(&patch);
}

static void __exit end(void)
{
}

module_init(begin);
module_exit(end);
MODULE_INFO(livepatch, "Y");
MODULE_LICENSE("Dual MIT/GPL");
MODULE_DESCRIPTION("A livepatch to be measured");
